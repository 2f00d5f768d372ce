"""What the flows show in Prefect's interface. Strings from outside are text there, whatever they hold.

What cannot be shown because Prefect's server is away is logged and fails nothing: the work is what matters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException

from pipelines.ray_jobs import without_user
from vlmflow.catalog import Verification
from vlmflow.catalog.verify import ERRORS, WARNINGS
from vlmflow.checks import Check
from vlmflow.config import Job
from vlmflow.engine import PlanSummary, RunReport
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.gate import GateReport
from vlmflow.report.flagged import newly_flagged
from vlmflow.report.rows import Row
from vlmflow.search.thumbnails import Thumbnail, make_thumbnails

logger = logging.getLogger("vlmflow")

# What Prefect's client raises, after a minute of trying again, where its server is away, refuses or has forgotten.
SERVER_ERRORS = (httpx.HTTPError, PrefectException, RuntimeError)
MAX_EXAMPLES = 12
_MAX_TEXT = 160
_MAX_CELL = 400
# What a run leaves as it is, by the name of its count in plans and reports.
_LEFT_ALONE = {
    "num_policy_differs": "rows are under another policy: run the backfill, or name theirs in the job",
    "num_exhausted": "images failed three times and are not tried again",
    "num_erased": "images were erased from the catalog and are left out",
    "num_unwatched": "images at http(s) urls without a version: no run sees that they have changed",
    "num_doubled": "images have more than one row, of another program: one is kept up to date, see vlmflow verify",
}
# Control and direction characters, and what is no character at all.
_INVISIBLE = r"\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ODD = re.compile(f"[{_INVISIBLE}]")
# Beside these, what Markdown or HTML could take for its own.
_MARKUP = re.compile(f"[`|<>{_INVISIBLE}]")


def code(text: str | None) -> str:
    """A string from outside as a code span, in which Markdown means nothing."""
    if not text:
        return "-"
    return f"`{_short(_MARKUP.sub(' ', text), _MAX_TEXT)}`"


def plain(text: str) -> str:
    """A string from outside for a table, whose cells are text."""
    return _short(_ODD.sub(" ", text), _MAX_CELL)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def link(uri: str) -> str:
    """An address: web addresses can be followed, others are text."""
    if not uri.startswith(("http://", "https://")):
        return code(uri)
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return f"[{code(name)}]({quote(uri, safe=':/?&=%#+,;@~', errors='replace')})"


def say_unshown(key: str, error: Exception) -> None:
    """Logs that an artifact could not be made or changed."""
    reason = _short(" ".join(without_user(str(error)).split()), _MAX_CELL)
    logger.warning("%s is not shown: Prefect's server cannot be told: %s: %s", key, type(error).__name__, reason)


@contextmanager
def _telling(key: str) -> Iterator[None]:
    try:
        yield
    except SERVER_ERRORS as error:
        say_unshown(key, error)


def _show_table(rows: list[dict[str, Any]], key: str, description: str) -> None:
    with _telling(key):
        create_table_artifact(rows, key=key, description=description)


def _show_markdown(text: str, key: str, description: str) -> None:
    with _telling(key):
        create_markdown_artifact(text, key=key, description=description)


def show_checks(key: str, checks: Sequence[Check]) -> None:
    """What doctor found, as a table."""
    rows = [
        {
            "check": plain(check.name),
            "verdict": check.verdict,
            "found": plain(check.found),
            "remedy": plain(check.remedy),
        }
        for check in checks
    ]
    _show_table(rows, key, "What the run needs, and what of it is there.")


def show_gate(key: str, report: GateReport) -> None:
    """The verdict of the quality gate."""
    lines = [
        f"# Quality gate {'open' if report.passed else 'closed'}",
        f"{report.num_images:,} golden images were compared with their accepted values.",
        *(f"- **regression**: {code(problem)}" for problem in report.problems),
        *(f"- {code(note)}" for note in report.notes),
    ]
    if report.equal_captions is not None:
        lines.append(f"- captions equal: {report.equal_captions:.1%}")
    if report.shifts:
        lines += ["", "| label | mean shift of its margins |", "| --- | --- |"]
        lines += [f"| {code(label)} | {shift:.4f} |" for label, shift in report.shifts.items()]
    if not report.passed:
        lines += ["", "Nothing was written. If the change is meant, accept the new values: `vlmflow gate accept`."]
    _show_markdown("\n".join(lines), key, "Golden set against accepted values.")


def left_alone(found: PlanSummary | RunReport) -> dict[str, int]:
    """How much a run leaves as it is, by what it is, in words; nothing of which there is none."""
    counts = {what: int(getattr(found, name)) for name, what in _LEFT_ALONE.items()}
    return {what: count for what, count in counts.items() if count}


def show_plan(key: str, plan: PlanSummary) -> None:
    """What is due, by task and reason, and what is left alone."""
    rows: list[dict[str, object]] = [
        {"what": "listed", "reason": "", "images": plan.num_listed},
        {"what": "nothing due", "reason": "", "images": plan.num_unchanged},
    ]
    rows += [
        {"what": task, "reason": reason, "images": count}
        for task, reasons in plan.due.items()
        for reason, count in reasons.items()
    ]
    rows += [
        {"what": "caller's columns", "reason": plain(name), "images": count}
        for name, count in plan.outdated_columns.items()
    ]
    rows += [{"what": "left alone", "reason": what, "images": count} for what, count in left_alone(plan).items()]
    _show_table(rows, key, f"{plan.num_planned:,} images are due.")


def show_verification(key: str, found: Verification) -> None:
    """What a verification found, with an example of each."""
    rows: list[dict[str, object]] = [
        {"finding": "images listed", "count": found.num_listed, "kind": "", "example": ""},
        {"finding": "rows", "count": found.num_rows, "kind": "", "example": ""},
    ]
    rows += [
        {
            "finding": (ERRORS | WARNINGS)[kind],
            "count": finding.count,
            "kind": "error" if kind in ERRORS else "warning",
            "example": plain(next(iter(finding.examples), "")),
        }
        for kind, finding in found.findings.items()
    ]
    sound = "is sound" if found.is_sound else "is not sound"
    _show_table(rows, key, f"The catalog {sound}.")


def show_counts(key: str, report: RunReport) -> None:
    """What a run did, as a table of counts."""
    rows: list[dict[str, object]] = [
        {"what": "rows", "value": "new", "images": report.num_added},
        {"what": "rows", "value": "replaced", "images": report.num_replaced},
        {"what": "rows", "value": "columns updated", "images": report.num_columns_updated},
    ]
    for what, counts in (("status", report.statuses), ("decision", report.decisions), ("error", report.errors)):
        rows += [{"what": what, "value": value, "images": count} for value, count in counts.items()]
    rate = f"{report.images_per_s:g} images/s" if report.images_per_s else "one block"
    _show_table(rows, key, f"Run {report.run_id}, {report.status}, {rate}.")


def show_flagged(key: str, job: Job, run_id: str) -> int:
    """A few images that a run flagged anew: links and blurred thumbnails only, for nobody asked to see them.

    Returns:
        How many there are.
    """
    count, rows = newly_flagged(job.catalog, run_id, MAX_EXAMPLES)
    if not count:
        return 0
    thumbnails = make_thumbnails([row.hit for row in rows], job.catalog, job=job)
    lines = [f"# {count:,} newly flagged", "", "| image | decision | because | blurred |", "| --- | --- | --- | --- |"]
    lines += [_flagged_line(row, thumbnail) for row, thumbnail in zip(rows, thumbnails, strict=True)]
    _show_markdown("\n".join(lines), key, f"{count:,} images were not flagged before.")
    return count


def _flagged_line(row: Row, thumbnail: Thumbnail) -> str:
    shown = thumbnail.uri is not None and thumbnail.is_blurred
    picture = f"![blurred]({thumbnail.uri})" if shown else code(thumbnail.reason)
    return f"| {link(row.hit.uri)} | {row.hit.decision} | {code(row.hit.decision_reason)} | {picture} |"


def show_report(key: str, place: str, url: str | None, description: str) -> None:
    """Where the report of a run lies."""
    if url is not None:
        with _telling(key):
            create_link_artifact(url, link_text="Report of the run", key=key, description=description)
    else:
        _show_markdown(f"The report of the run is at {code(place)}.", key, description)


def show_partitions(key: str, reports: Mapping[str, RemoderateReport | None]) -> None:
    """How far a backfill is, partition by partition."""
    rows = [
        {
            "partition": partition,
            "state": "waiting" if report is None else report.status,
            "images": None if report is None else report.num_moved,
            "flips": None if report is None else sum(report.flips.values()),
            "seconds": None if report is None else round(report.seconds, 1),
        }
        for partition, report in reports.items()
    ]
    done = [report for report in reports.values() if report is not None]
    dry = ", as a dry run: nothing is written" if any(report.dry_run for report in done) else ""
    _show_table(rows, key, f"{len(done)} of {len(reports)} partitions{dry}.")


def show_diff(key: str, title: str, reports: Sequence[RemoderateReport]) -> None:
    """How decisions flip: in all, by label, and a few images of each change."""
    moved = sum(report.num_moved for report in reports)
    move, come = ("would move", "would come") if any(report.dry_run for report in reports) else ("moved", "came")
    lines = [f"# {title}", "", f"{moved:,} images {move}.", "", "| change | images |", "| --- | --- |"]
    lines += [f"| {change} | {count:,} |" for change, count in _sum(report.flips for report in reports).items()]
    if policies := policies_of(reports):
        lines += ["", f"| {come} under | images |", "| --- | --- |"]
        lines += [f"| {code(policy)} | {count:,} |" for policy, count in policies.items()]
    labels: dict[str, dict[str, int]] = {}
    for report in reports:
        for label, flips in report.label_flips.items():
            labels[label] = _sum([labels.get(label, {}), flips])
    if labels:
        lines += ["", "| label | change | images |", "| --- | --- | --- |"]
        lines += [
            f"| {code(label)} | {change} | {count:,} |"
            for label, flips in sorted(labels.items())
            for change, count in flips.items()
        ]
    examples = [example for report in reports for example in report.examples][:MAX_EXAMPLES]
    if examples:
        lines += ["", "| image | before | after | because |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {link(example['uri'] or '')} | {example['before']} | {example['after']} "
            f"| {code(example['decision_reason'])} |"
            for example in examples
        ]
    left = {
        "keep their policy: their vectors are another model's": sum(report.num_other_model for report in reports),
        "keep their policy: a detector must see them first": sum(report.num_undetected for report in reports),
        "come out as `review`: their vectors are lost": sum(report.num_without_vectors for report in reports),
        "stay: none is known that they had before": sum(report.num_first for report in reports),
    }
    lines += ["", *(f"- {count:,} images {what}" for what, count in left.items() if count)]
    for run_id, policy in {beside: name for report in reports for beside, name in report.runs_beside.items()}.items():
        lines.append(f"- run {code(run_id)} was at work under {code(policy)}: what it commits later stays under that")
    _show_markdown("\n".join(lines), key, title)


def policies_of(reports: Sequence[RemoderateReport]) -> dict[str, int]:
    """Rows that moved, by the policy that they came under; those that none came under are left out."""
    return {policy: count for policy, count in _sum(report.policies for report in reports).items() if count}


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
