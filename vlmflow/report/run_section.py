"""What the run did: counts, errors, speed, and what limited it."""

from __future__ import annotations

from typing import Any

from vlmflow.engine.limits import what_limited
from vlmflow.engine.progress import duration
from vlmflow.engine.report import RunReport
from vlmflow.report.charts import bar, count_table
from vlmflow.report.html import NOTHING, Html, details, facts, heading, number, paragraph, section, table, text
from vlmflow.report.runs import RunFacts

_POOL = ("pool", "#batches", "#busy", "#waiting", "out of memory", "#JPEGs refused")
_SHARES = ("#share", "#waiting", "#TFLOP/s", "#of the ceiling")


def run_section(run: RunFacts | None) -> Html:
    """The section on a run; None: the catalog has no record of one."""
    if run is None:
        return section("run", "The run", paragraph(Html("The catalog holds no record of a run that wrote rows.")))
    if run.enrichment is None:
        return section("run", "The run", _other(run))
    report = run.enrichment
    return section(
        "run",
        "The run",
        paragraph(text(report.message, 2_000), kind="warn") if report.message else NOTHING,
        _unfinished(report, run.state),
        _overview(report, run.state),
        _counts(report),
        _speed(report),
        _provenance(report),
    )


def _unfinished(report: RunReport, state: str) -> Html:
    if state == "running":
        return paragraph(Html("The run is still going on: its figures come when it has finished."), kind="warn")
    if report.finished_at is not None:
        return NOTHING
    words = (
        "The run did not come to complete its record. What it committed stays, and is counted here from the table, "
        "without the rows that other runs have written since; what else it did is not known."
    )
    if state == "dead":
        words = f"The run gave no sign of life for ten minutes. {words}"
    return paragraph(Html(words), kind="warn")


def _overview(report: RunReport, state: str) -> Html:
    status = report.status if state == "finished" else f"{report.status} ({state})"
    return facts(
        {
            "Run": text(report.run_id),
            "Status": text(status),
            "Source": text(report.source),
            "Started": text(f"{report.started_at:%Y-%m-%d %H:%M:%S %Z}"),
            "Took": text(duration(report.seconds)),
            "Listed": text(report.num_listed),
            "Up to date": text(report.num_unchanged),
            "New rows": text(report.num_added),
            "Updated rows": text(report.num_replaced),
            "Rows with new columns": text(report.num_columns_updated),
            "By equal bytes": text(report.num_copied + report.num_shared),
            "Unchanged, say their servers": text(report.num_unmodified),
            "By other runs": text(report.num_by_others),
            "Under another policy": text(report.num_policy_differs),
            "At urls that nobody watches": text(report.num_unwatched),
            "With more than one row": text(report.num_doubled),
            "Profile": text(report.profile),
            "Policy": text(report.policy),
        }
    )


def _counts(report: RunReport) -> Html:
    rows, decided = report.num_added + report.num_replaced, sum(report.decisions.values())
    parts = [
        count_table("Rows of the run by status", "status", report.statuses, rows),
        count_table("Rows that the run decided on, by decision", "decision", report.decisions, decided)
        if decided
        else NOTHING,
        count_table("Errors of the run by class", "class", report.errors, rows)
        if report.errors
        else paragraph(Html("No image had an error.")),
    ]
    return Html(f'<div class="side">{"".join(parts)}</div>')


def _speed(report: RunReport) -> Html:
    most = max((stage.busy_s for stage in report.stages), default=0.0)
    stages = [
        (
            text(stage.stage),
            text(stage.images),
            text(f"{stage.busy_s:,.1f} s"),
            Html(f"{stage.images_per_busy_s:,.1f}"),
            _percent(stage.busy_share),
            _percent(stage.waiting_share),
            NOTHING if stage.tflops_per_s is None else Html(f"{stage.tflops_per_s:,.3g}"),
            _percent(stage.share_of_ceiling),
            bar(stage.busy_s, most),
        )
        for stage in report.stages[:50]
    ]
    pools = [
        (
            text("+".join(pool.tasks)),
            text(pool.batches),
            Html(f"{pool.busy_s / max(pool.busy_s + pool.waiting_s, 1e-9):.0%}"),
            Html(f"{pool.waiting_s / max(pool.busy_s + pool.waiting_s, 1e-9):.0%}"),
            text("never" if pool.at_once is None else f"{pool.at_once:,} images at once since"),
            text(pool.num_refused),
        )
        for pool in report.pools[:50]
    ]
    rate = f"{duration(report.startup_s)} of start-up"
    if report.waited_s:
        rate = f"{duration(report.waited_s)} of waiting for other runs, {rate}"
    if report.images_per_s:
        rate += f", then {report.images_per_s:,.1f} images/s"
    limited = what_limited(report)
    hidden = '<span class="hidden">bar</span>'
    return Html(
        heading("Speed")
        + paragraph(Html(f"{rate}; {report.bytes_read / 1e6:,.1f} MB read."))
        + (paragraph(Html("<b>What limited it.</b>"), text(limited, None)) if limited else NOTHING)
        + '<div class="side">'
        + (
            table(
                "Time by stage, all workers together",
                ["stage", "#images", "#busy", "#images/s of a worker", *_SHARES, hidden],
                stages,
            )
            if stages
            else NOTHING
        )
        + (table("Pools", _POOL, pools) if pools else NOTHING)
        + "</div>"
    )


def _percent(share: float | None) -> Html:
    return NOTHING if share is None else Html(f"{share:.0%}")


def _provenance(report: RunReport) -> Html:
    due = [
        (text(task), text(", ".join(f"{reason} {count:,}" for reason, count in reasons.items())))
        for task, reasons in list(report.due.items())[:20]
    ]
    models = [(text(task), text(model)) for task, model in list(report.models.items())[:20]]
    versions = [(text(name), text(version)) for name, version in list(report.versions.items())[:40]]
    return details(
        "Models, versions and what was due",
        table("What was due", ["task", "because"], due),
        table("Models", ["task", "model"], models),
        table("Versions", ["package", "version"], versions),
    )


def _other(run: RunFacts) -> Html:
    """A run of another kind, such as a remoderation: the figures of its record, and its changes of decision."""
    plain = {name: value for name, value in run.record.items() if isinstance(value, str | int | float | None)}
    pairs = [(text(name), _value(value)) for name, value in list(plain.items())[:40]]
    tables = [table("Record of the run", ["what", "value"], pairs)]
    for name, title in (("decisions", "Rows by decision"), ("flips", "Changes of decision")):
        counts = run.record.get(name)
        if isinstance(counts, dict) and counts and all(isinstance(count, int) for count in counts.values()):
            tables.append(count_table(f"{title}, in this run", "decision", counts, sum(counts.values())))
    return Html(
        paragraph(Html("This run did not enrich images; its record says:"))
        + f'<div class="side">{"".join(tables)}</div>'
    )


def _value(value: Any) -> Html:
    return number(value) if isinstance(value, float) else text(value)
