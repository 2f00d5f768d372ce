"""Runs that never completed their record, because they were killed: the table tells what they committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.catalog.masks import equal
from vlmflow.catalog.rows import add_counts, error_classes
from vlmflow.engine.report import RunReport


@dataclass
class _Counts:
    num_rows: int = 0
    num_new: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def enrichment_of(record: Mapping[str, Any]) -> RunReport | None:
    """The record of a run as a report; None: another kind of run, or written by a version that we do not understand."""
    known = {name: value for name, value in record.items() if name in RunReport.model_fields}
    try:
        return RunReport.model_validate(known)
    except ValidationError:
        return None


def with_counts(catalog: Catalog, reports: Sequence[RunReport]) -> list[RunReport]:
    """Fills in what killed runs committed, from the rows that they were the last to write; others stay as they are.

    Rows that another run has written since count as that run's. A row whose image was first seen on another date than
    the run's own counts as replaced; of the others as many as the run's record says, which tells up to the last commit
    or the one before. One pass over a few columns of the images table, and none without a killed run.

    Args:
        reports: of runs that commit no more.

    Raises:
        CatalogError: a file of the table is gone or damaged.
        StorageAccessError, TransientError: the store cannot be read.
    """
    killed = {report.run_id: (report, _Counts()) for report in reports if report.finished_at is None}
    if not killed:
        return list(reports)
    for rows in catalog.image_batches(["run_id", "ingest_date", "status", "decision", "errors"]):
        for run_id in set(rows["run_id"].unique().to_pylist()) & killed.keys():
            report, counts = killed[run_id]
            of_run = rows.filter(pa.array(equal(rows["run_id"], run_id)))
            counts.num_rows += of_run.num_rows
            counts.num_new += int(equal(of_run["ingest_date"], pa.scalar(report.date, pa.date32())).sum())
            add_counts(counts.statuses, of_run["status"])
            add_counts(counts.decisions, of_run["decision"])
            add_counts(counts.errors, error_classes(of_run["errors"])[1])
    return [_filled(*killed[report.run_id]) if report.run_id in killed else report for report in reports]


def _filled(report: RunReport, counts: _Counts) -> RunReport:
    num_replaced = max(counts.num_rows - counts.num_new, min(report.num_replaced, counts.num_rows))
    return report.model_copy(
        update={
            "num_added": counts.num_rows - num_replaced,
            "num_replaced": num_replaced,
            "statuses": dict(counts.statuses),
            "decisions": dict(counts.decisions),
            "errors": dict(counts.errors),
        }
    )
