"""What the command line prints: reports, plans, summaries, profiles and checks as short tables."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlmflow.engine.limits import what_limited
from vlmflow.engine.progress import duration
from vlmflow.engine.report import PlanSummary, RunReport
from vlmflow.engine.stages import StageReport
from vlmflow.summary import CatalogSummary, Example, summarize
from vlmflow.views_search import printable, table_of
from vlmflow.views_upkeep import counted

if TYPE_CHECKING:
    from vlmflow.checks import Check
    from vlmflow.models.profiles import ProfileStatus

__all__ = [
    "check_as_json",
    "print_check",
    "print_plan",
    "print_profiles",
    "print_report",
    "print_summary",
    "profiles_as_json",
    "summarize",
]

_COLOURS = {"ok": "green", "allow": "green", "review": "yellow", "warn": "yellow", "block": "red", "fail": "red"}


def print_report(report: RunReport, console: Console) -> None:
    """Prints what a run did, where its time went, and what to do next."""
    if report.status == "nothing_due":
        number = f"{'' if report.num_exhausted or report.num_erased else 'all '}{report.num_unchanged:,}"
        console.print(f"Nothing due: {number} images of {escape(report.source)} are up to date.")
        _print_left_out_note(report, console)
        _print_columns_note(report.num_columns_updated, console)
        _print_policy_note(report.num_policy_differs, console)
        _print_unwatched_note(report.num_unwatched, console)
        _print_doubled_note(report.num_doubled, console)
        _print_unused_note(report.unused, console)
        return
    rows = report.num_added + report.num_replaced
    rate = f"{duration(report.startup_s)} of start-up"
    if report.waited_s:
        rate = f"{duration(report.waited_s)} of waiting for other runs, {rate}"
    if report.images_per_s:
        rate += f", then {report.images_per_s:,.1f} images/s"
    console.print(
        f"[bold]{rows:,} images[/bold] in {duration(report.seconds)}, {rate}: "
        f"{report.num_added:,} new, {report.num_replaced:,} updated, {report.num_unchanged:,} were up to date"
    )
    _print_left_out_note(report, console)
    if report.num_by_others:
        console.print(f"{report.num_by_others:,} more were committed by another run meanwhile")
    _print_columns_note(report.num_columns_updated, console)
    if report.num_copied or report.num_shared:
        # Of what was run, whoever committed it.
        share = (report.num_copied + report.num_shared) / max(1, rows + report.num_by_others)
        console.print(
            f"equal bytes: {report.num_copied:,} images took results from the catalog, {report.num_shared:,} from each "
            f"other ({share:.1%} not computed again)"
        )
    if report.num_unmodified:
        console.print(f"{counted(report.num_unmodified, 'image')} not downloaded: unchanged, says the server")
    _print_counts("status", report.statuses, console)
    if "moderate" in report.tasks:
        _print_counts("decision", report.decisions, console)
    _print_counts("errors", report.errors, console)
    print_stages(report.stages, console)
    for pool in report.pools:
        share = pool.busy_s / max(pool.busy_s + pool.waiting_s, 1e-9)
        console.print(f"pool {'+'.join(pool.tasks)}: {share:.0%} busy, {1 - share:.0%} waiting for images")
        if pool.at_once is not None:
            console.print(f"  out of memory: it went on with at most {pool.at_once:,} images at once; set batch_size")
        if pool.num_refused:
            console.print(
                f"  {pool.num_refused:,} JPEGs went from its device to a processor: damaged, or out of memory"
            )
    for task, usage in report.usage.items():
        tokens = f"{usage.input_tokens:,} input and {usage.output_tokens:,} output tokens"
        cost = f", cost {usage.cost:,.4f}" if usage.cost else ""
        console.print(f"{task} spent {usage.requests:,} requests, {tokens}{cost}")
    if limited := what_limited(report):
        console.print(f"what limited it: {limited[0].lower()}{limited[1:]}")
    _print_policy_note(report.num_policy_differs, console)
    _print_unwatched_note(report.num_unwatched, console)
    _print_doubled_note(report.num_doubled, console)
    _print_unused_note(report.unused, console)
    # A command is copied: on a line that nothing folds, and as the shell takes it.
    command = f"vlmflow show {escape(shlex.quote(report.catalog))}"
    console.print(f"run {report.run_id}; look at it with: {command}", soft_wrap=True)


def print_stages(stages: Sequence[StageReport], console: Console) -> None:
    """Prints where the time went, and how near the models came to what the device can do."""
    table = table_of("stage", "images", "busy", "images/s of one worker", "share", "waiting", "TFLOP/s", "of ceiling")
    for stage in stages:
        table.add_row(
            stage.stage,
            f"{stage.images:,}",
            duration(stage.busy_s),
            f"{stage.images_per_busy_s:,.1f}",
            _percent(stage.busy_share),
            _percent(stage.waiting_share),
            "" if stage.tflops_per_s is None else f"{stage.tflops_per_s:,.3g}",
            _percent(stage.share_of_ceiling),
        )
    console.print(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def print_plan(summary: PlanSummary, console: Console) -> None:
    """Prints what a run would do."""
    console.print(
        f"{summary.num_listed:,} images listed, {summary.num_unchanged:,} up to date, "
        f"[bold]{summary.num_planned:,} to do[/bold] ({summary.num_new:,} of those due are new)"
    )
    if summary.num_outdated:
        columns = ", ".join(f"{escape(name)} {count:,}" for name, count in summary.outdated_columns.items())
        console.print(
            f"new values of the caller's columns, or another alternative text, for "
            f"{counted(summary.num_outdated, 'row')} on which no task will run: {columns}",
            highlight=False,
        )
    if summary.num_planned < summary.num_due:
        console.print(f"{summary.num_due:,} are due, the limit leaves {summary.num_planned:,}")
    if summary.num_duplicates:
        console.print(f"{summary.num_duplicates:,} references repeat an image and count once")
    _print_left_out_note(summary, console)
    table = table_of("task", "images", "because")
    for task, reasons in summary.due.items():
        because = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        table.add_row(task, f"{sum(reasons.values()):,}", because or "nothing due")
    console.print(table)
    if summary.policy:
        console.print(f"policy {escape(summary.policy)}")
    _print_policy_note(summary.num_policy_differs, console)
    _print_unwatched_note(summary.num_unwatched, console)
    _print_doubled_note(summary.num_doubled, console)
    _print_unused_note(summary.unused, console)


def print_summary(summary: CatalogSummary, console: Console) -> None:
    """Prints what a catalog holds."""
    console.print(
        f"[bold]{escape(summary.catalog)}[/bold]: {summary.num_images:,} images, {summary.num_vectors:,} vectors, "
        f"version {summary.version}"
    )
    _print_counts("status", summary.statuses, console)
    _print_counts("decision", summary.decisions, console)
    _print_counts("errors", summary.errors, console)
    _print_counts("policy", summary.policies, console)
    for task, models in summary.models.items():
        _print_counts(task, models, console)
    _print_counts("alternative texts", summary.alt_texts, console)
    _print_examples("allowed", summary.examples, console)
    _print_examples("flagged" if summary.policies else "not moderated yet", summary.flagged, console)
    table = table_of("run", "state", "started (UTC)", "new", "updated", "images/s", "")
    table.columns[0].no_wrap = True  # ids are copied
    for run in summary.runs:
        started = run.started_at[:19].replace("T", " ")
        counts = (f"{run.num_added:,}", f"{run.num_replaced:,}", f"{run.images_per_s:,.1f}")
        note = f"columns of {counted(run.num_columns_updated, 'row')}" if run.num_columns_updated else ""
        if run.operation is not None:
            note = run.operation + (f": {counted(run.num_moved, 'row')}" if run.num_moved else "")
        table.add_row(run.run_id, run.state, started, *counts, escape(printable(run.message or note)))
    console.print(table)
    if summary.undelivered:
        told = f"{counted(len(summary.undelivered), 'message')} could not be sent to people; the next flow does it:"
        console.print(told, style="yellow")
    for message in summary.undelivered:
        line = f"{message.at.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC  {message.subject}: {message.body}"
        console.print(printable(line), markup=False, highlight=False)


def print_profiles(profiles: Sequence[ProfileStatus], console: Console) -> None:
    """Prints the named sets of models."""
    for profile in profiles:
        console.print(f"[bold]{profile.name}[/bold]: {profile.purpose}")
        table = table_of("role", "model", "licence", "size", "weights")
        for model in profile.models:
            size = f"{model.size_bytes / 1e6:,.0f} MB"
            found = "[red]damaged[/red]" if model.problem else "[yellow]absent[/yellow]"
            found = "[green]present[/green]" if model.present else found
            table.add_row(model.role, model.repo, model.licence, size, found)
        console.print(table)
        for problem in (model.problem for model in profile.models if model.problem):
            console.print(problem, style="red", soft_wrap=True, markup=False)
        # A path is copied more often than it is read: on a line of its own, never folded.
        for folder in dict.fromkeys(model.folder.parent for model in profile.models):
            console.print(f"in {folder}/<name of the model>\n", style="dim", soft_wrap=True, markup=False)
    console.print("VLMFLOW_MODELS names another folder for weights than ~/.cache/vlmflow/models.")


def profiles_as_json(profiles: Sequence[ProfileStatus]) -> str:
    """The profiles as a JSON array."""
    return json.dumps([dataclasses.asdict(profile) for profile in profiles], default=str)


def print_check(check: Check, console: Console) -> None:
    """Prints one line of the doctor, and the remedy on a second."""
    colour = _COLOURS[check.verdict]
    console.print(f"[{colour}]{check.verdict:>4}[/{colour}]  {escape(check.name)}: {escape(check.found)}")
    if check.remedy:
        console.print(f"      {escape(check.remedy)}", style="dim")


def check_as_json(check: Check) -> str:
    """The check as one line of JSON."""
    return json.dumps(dataclasses.asdict(check))


def _print_counts(name: str, counts: Mapping[str, int], console: Console) -> None:
    if not counts:
        return
    parts = []
    for value, count in sorted(counts.items(), key=lambda item: -item[1]):
        colour = _COLOURS.get(value)
        shown = f"[{colour}]{escape(value)}[/{colour}]" if colour else escape(value)
        parts.append(f"{shown} {count:,}")
    console.print(f"{name}: " + ", ".join(parts))


def _print_examples(name: str, examples: Sequence[Example], console: Console) -> None:
    if not examples:
        return
    asked = any(example.answers for example in examples)
    table = table_of(name, "decision", "caption", "caption match", "text match", *(["answers"] if asked else []))
    for example in examples:
        decision = example.decision + (f" ({example.decision_reason})" if example.decision_reason else "")
        file_name = example.uri.rsplit("/", 1)[-1]
        table.add_row(
            escape(printable(file_name)),
            escape(decision),
            escape(printable(example.caption or "-")),
            _match(example.caption_itm, example.caption_itc),
            _match(example.text_itm, example.text_itc),
            *([_answers(example)] if asked else []),
        )
    console.print(table)


def _match(itm: float | None, itc: float | None) -> str:
    """By the matching head; of models that have none, the cosine."""
    return _number(itm) if itm is not None or itc is None else f"{itc:.3f} (cosine)"


def _answers(example: Example) -> str:
    parts = [f"{answer['question']} {answer['answer'] or '-'}" for answer in example.answers or ()]
    return escape(printable("; ".join(parts) or "-"))


def _print_left_out_note(counts: PlanSummary | RunReport, console: Console) -> None:
    if counts.num_exhausted:
        console.print(
            f"{counts.num_exhausted:,} failed three times and are left alone; --retry failed,partial,missing tries them"
        )
    if counts.num_erased:
        console.print(f"{counts.num_erased:,} were erased from the catalog and are left out")


def _print_unwatched_note(num_unwatched: int, console: Console) -> None:
    if num_unwatched:
        console.print(
            f"[yellow]{counted(num_unwatched, 'image')} at http(s) urls without a version: should another come to lie "
            "there, no run sees it.[/yellow] Give the manifest a column etag, or set source.http.recheck_days in the "
            "job file to have them read again"
        )


def _print_doubled_note(num_doubled: int, console: Console) -> None:
    if num_doubled:
        console.print(
            f"[yellow]{counted(num_doubled, 'image')} with more than one row, which another program has written: a run "
            "keeps one of them up to date, the others may hold older decisions.[/yellow] vlmflow verify names them; "
            "delete all rows of each, and a run writes one"
        )


def _print_unused_note(unused: Sequence[str], console: Console) -> None:
    if unused:
        console.print(
            f"[yellow]set, and read by none of the tasks: {escape(', '.join(unused))}.[/yellow] Add the task, or leave "
            "the key out"
        )


def _print_policy_note(num_policy_differs: int, console: Console) -> None:
    if num_policy_differs:
        console.print(
            f"{num_policy_differs:,} rows were decided under another policy and keep it; a new policy is not applied "
            "to images with nothing else due"
        )


def _print_columns_note(num_updated: int, console: Console) -> None:
    if num_updated:
        console.print(
            "the caller's columns or alternative texts were updated in "
            f"{counted(num_updated, 'row')} on which no task ran"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
