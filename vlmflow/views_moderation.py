"""What the command line prints of moderation: how decisions flip."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlmflow.engine.progress import duration
from vlmflow.moderation.detections import why_not
from vlmflow.views_search import printable, table_of

if TYPE_CHECKING:
    from vlmflow.engine.remoderate_report import RemoderateReport
    from vlmflow.explain import Evidence
    from vlmflow.review import QueueReport, ReviewReport


def print_remoderation(report: RemoderateReport, console: Console) -> None:
    """Prints what a remoderation changed, or would change."""
    verb = "would come" if report.dry_run else "came"
    what = "the policy that each had before"
    if report.rollback_of is None:
        what = f"policy {escape(report.policy)} ({report.policy_digest[:12]})"
    console.print(
        f"[bold]{report.num_moved:,} images[/bold] {verb} under {what} in {duration(report.seconds)}, "
        f"{report.num_from_margins:,} of them by stored margins, the others by stored vectors"
    )
    if report.rollback_of is not None:
        _print_counts("policies", {escape(name): count for name, count in report.policies.items()}, console)
    if not (report.num_moved or report.num_other_model or report.num_undetected or report.num_first):
        console.print("All images asked for are under it already, or none was asked for.")
    _print_counts("decisions", report.decisions, console)
    _print_counts("changed", report.flips, console)
    if report.label_flips:
        table = table_of("label", "changes")
        for label, flips in report.label_flips.items():
            table.add_row(escape(label), ", ".join(f"{change} {count:,}" for change, count in flips.items()))
        console.print(table)
    if report.examples:
        table = table_of("change", "image", "because")
        for example in report.examples:
            change = f"{example['before']} -> {example['after']}"
            table.add_row(change, escape(printable(example["uri"] or "")), escape(example["decision_reason"] or "-"))
        console.print(table)
    if report.num_other_model:
        console.print(
            f"[yellow]{report.num_other_model:,} images keep their policy: their vectors are another model's.[/yellow] "
            "`vlmflow enrich --tasks embed,moderate` computes them anew."
        )
    if report.num_undetected:
        policy = "the new --policy" if report.rollback_of is None else "the policy that they go back to as --policy"
        console.print(
            f"[yellow]{report.num_undetected:,} images keep theirs: {escape(', '.join(report.detectors))} must see "
            f"them first.[/yellow] `vlmflow enrich` with {policy} does that, and moderates them."
        )
    if report.num_without_vectors:
        console.print(f"[yellow]{report.num_without_vectors:,} images have lost their vectors and are review.[/yellow]")
    if report.num_first:
        console.print(
            f"{report.num_first:,} images stay under the policy rolled back: they were first moderated under it, or an "
            "earlier rollback put them back. `vlmflow remoderate --policy` moves them."
        )
    for run_id, policy in report.runs_beside.items():
        console.print(
            f"[yellow]Run {escape(run_id)} is at work under policy {escape(policy)}:[/yellow] rows that it commits "
            "from now on stay under that. When it has ended, run this once more."
        )


def print_evidence(evidence: Evidence, console: Console) -> None:
    """Prints what a decision rests on."""
    console.print(f"[bold]{escape(evidence.decision)}[/bold] ({escape(evidence.decision_reason or 'nothing found')})")
    lines = [evidence.uri]
    if evidence.verdict is not None:
        said = evidence.verdict
        because = f": {said['reason']}" if said["reason"] else ""
        lines.append(f"verdict {said['decision']} by {said['reviewer']}{because}")
        lines.append(f"the model says {said['model_decision']} ({said['model_reason'] or 'nothing found'})")
    lines += [f"{error['stage']}: {error['class']}, {error['message']}" for error in evidence.errors]
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    if evidence.labels:
        table = table_of("label", "decision", "value", "review", "block", "margin", "view", "by")
        for label in evidence.labels:
            value = label["probability"] if label["probability"] is not None else label["score"]
            view = (label["view"] or "-") + (f" at {label['time_s']:.2f} s" if label["time_s"] is not None else "")
            numbers = (value, label["review_threshold"], label["block_threshold"], label["margin"])
            shown = ("-" if number is None else f"{number:.3f}" for number in numbers)
            name = escape(f"{label['category']}/{label['label']}")
            table.add_row(name, label["decision"], *shown, escape(view), escape(label["detector"] or "prompts"))
        console.print(table)
        for label in evidence.labels:
            because = why_not(label, evidence.labels, *evidence.by_model)
            if because:
                name = f"{label['category']}/{label['label']} by {label['detector'] or 'prompts'}"
                console.print(f"{name}: {because}", markup=False, highlight=False, soft_wrap=True)
    names = f"policy {evidence.policy or '-'}, model {evidence.embed_model or '-'}, last run {evidence.run_id}"
    console.print(printable(names), markup=False, highlight=False, soft_wrap=True)


def print_queue(report: QueueReport, console: Console) -> None:
    """Prints what went into a review queue, and what to do with it."""
    kinds = ", ".join(f"{name} {count:,}" for name, count in report.queues.items()) or "nothing to look at"
    console.print(f"[bold]{report.num_images:,} images[/bold] in {escape(report.output)}: {kinds}")
    if report.num_labelled:
        console.print(
            f"{report.num_labelled:,} images are left out: labels were said of them, and no verdict. `vlmflow serve` "
            "shows them among those that nobody has decided."
        )
    places = escape(shlex.join([report.catalog, report.output]))
    console.print(f"Fill in verdict and reviewer, then: vlmflow review import {places}", soft_wrap=True)


def print_review(report: ReviewReport, console: Console) -> None:
    """Prints what became of verdicts."""
    console.print(
        f"[bold]{report.num_verdicts:,} verdicts[/bold], {report.num_new:,} of them new; "
        f"{report.num_changed:,} images came under another verdict"
    )
    _print_counts("changed", report.flips, console)
    for reason, count in report.left_out.items():
        console.print(f"[yellow]left out[/yellow] {count:,}: {escape(reason)}")
    if report.num_outdated:
        console.print(
            f"[yellow]without effect[/yellow] {report.num_outdated:,}: the catalog has a newer verdict that says "
            "otherwise. Where yours came last, fill in `at` with a later time"
        )
    if report.num_waiting:
        console.print(f"{report.num_waiting:,} verdicts are on bytes that the catalog does not hold now; they wait")


def _print_counts(name: str, counts: dict[str, int], console: Console) -> None:
    if counts:
        console.print(f"{name}: " + ", ".join(f"{value} {count:,}" for value, count in counts.items()))
