"""What the command line prints of policies: what ships, what a check found, how two differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlmflow.views_search import table_of

if TYPE_CHECKING:
    from vlmflow.moderation.calibrate import CalibrationReport
    from vlmflow.moderation.check import PolicyCheck
    from vlmflow.moderation.diff import PolicyDiff
    from vlmflow.moderation.policy import Policy

_COLORS = {"error": "red", "warning": "yellow", "note": "dim"}


def print_policies(policies: list[Policy], console: Console) -> None:
    """Prints the policies that ship, one a line."""
    table = table_of("policy", "version", "labels", "thresholds set for", "what it is for")
    for policy in policies:
        bound = ", ".join(binding.model for binding in policy.bindings) or "no model yet"
        row = (policy.name, policy.version, str(len(policy.labels)), bound, policy.description)
        table.add_row(*map(escape, row))
    console.print(table)


def print_policy_check(check: PolicyCheck, console: Console) -> None:
    """Prints findings, the gravest first, and their counts."""
    for finding in check.findings:
        color = _COLORS[finding.level]
        console.print(f"[{color}]{finding.level}[/{color}] {escape(f'{finding.where}: {finding.text}')}")
        console.print(f"    {escape(finding.remedy)}", style="dim")
    judged = "" if check.limit is None else f", closeness judged by {check.model} (limit {check.limit:.3f})"
    counts = ", ".join(f"{check.count(level)} {level}s" for level in ("error", "warning", "note"))
    console.print(escape(f"{check.policy or check.file}: {counts}{judged}"))


def print_policy_diff(diff: PolicyDiff, console: Console) -> None:
    """Prints what changed from one policy to another, and what that implies."""
    console.print(escape(f"{diff.before} -> {diff.after}"), style="bold")
    for sign, names in (("+", diff.labels_added), ("-", diff.labels_removed)):
        for name in names:
            console.print(f"{sign} label {escape(name)}")
    for old, new in diff.renamed:
        console.print(escape(f"label {old} is now {new}, with the same prompts"))
    for change in diff.prompts:
        lines = [f"+ {text}" for text in change.added] + [f"- {text}" for text in change.removed]
        console.print(escape(f"prompts of {change.where}:" + (" in another order" if change.reordered else "")))
        for line in lines:
            console.print(f"    {escape(line)}")
    if diff.changes:
        table = table_of("where", "what", "before", "after")
        for moved in diff.changes:
            table.add_row(escape(moved.where), escape(moved.what), _shown(moved.before), _shown(moved.after))
        console.print(table)
    for model in diff.lost_bindings:
        console.print(f"[yellow]The thresholds set for {escape(model)} do not count for the new prompts.[/yellow]")
    console.print(diff.implies)


def _shown(value: str | float | None) -> str:
    return "-" if value is None else escape(f"{value:g}" if isinstance(value, float) else value)


def print_calibration(report: CalibrationReport, console: Console) -> None:
    """Prints what a calibration set, label by label, and what to mind."""
    console.print(escape(f"{report.policy}: {report.num_verdicts:,} verdicts on {report.num_images:,} images"))
    table = table_of("label", "+/-", "review", "block", "precision at block", "recall at review")
    for label in report.labels:
        counts = f"{label.num_positive:,}/{label.num_negative:,}"
        if label.fit is None:
            table.add_row(escape(label.label), counts, "left as it was", "", "", "")
            continue
        block, review = label.after["block"], label.after["review"]
        shares = [_share(block.precision, block.precision_interval), _share(review.recall, review.recall_interval)]
        block_at = label.thresholds.block
        limits = [f"{label.thresholds.review:.3f}", "never" if block_at is None else f"{block_at:.3f}"]
        table.add_row(escape(label.label), counts, *limits, *map(escape, shares))
    console.print(table)
    for reason, num in report.left_out.items():
        console.print(f"[yellow]left out[/yellow] {num:,} verdicts: {escape(reason)}")
    for text in report.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(text)}")
    for label in report.labels:
        for text in [label.refused] if label.refused else label.warnings:
            console.print(f"[yellow]{escape(label.label)}[/yellow] {escape(text)}")
    console.print(f"[bold]{escape(report.new_policy)}[/bold] in {escape(report.output)}")


def _share(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None or interval is None:
        return "-"
    return f"{share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
