"""What a catalog holds, in numbers and examples: the content of ``vlmflow show``."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog import Catalog, RunInfo
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.messages import MESSAGES, Message, MessageStore
from vlmflow.catalog.rows import POLICY_COLUMNS, add_counts, error_classes, policy_names
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.engine.report import RunReport
from vlmflow.errors import StorageAccessError
from vlmflow.report.killed import enrichment_of, with_counts

logger = logging.getLogger("vlmflow")

_NUM_EXAMPLES = 5
_NUM_RUNS = 5
_COUNTED = (
    "status",
    "decision",
    "embed_model",
    "caption_model",
    "match_model",
    "answer_model",
    *POLICY_COLUMNS,
    "alt_text_rule",
)
_ALT_TEXT_IS_FINE = "keeps every rule of a single image"  # that others share it, `vlmflow alt-text` tells


class Example(Frozen):
    """An image as a person would want to see it listed."""

    uri: str
    status: str
    decision: str
    decision_reason: str | None
    caption: str | None
    caption_itm: float | None
    text_itm: float | None
    caption_itc: float | None = None
    text_itc: float | None = None
    alt_text: str | None = None
    answers: tuple[dict[str, Any], ...] | None = None  # question, answer, score


class RunLine(Frozen):
    """A run in one line.

    Attributes:
        state: running, dead, or how it ended.
        operation: what it was if it was no enrichment, such as erase.
        num_added: rows that were new; of a run that was killed or still goes on, those with its date.
        num_columns_updated: rows of which nothing but the caller's columns was updated.
        num_moved: rows that a remoderation put under another policy.
    """

    run_id: str
    state: str
    started_at: str
    num_added: int
    num_replaced: int
    num_columns_updated: int = 0
    num_moved: int = 0
    images_per_s: float
    message: str
    operation: str | None = None


class CatalogSummary(Frozen):
    """What is in a catalog.

    Attributes:
        version: of the images table in its log.
        policies: rows by policy, with name, version and the beginning of the digest.
        models: rows by model, per task.
        errors: rows by error class.
        alt_texts: rows with an alternative text by the rule that it breaks.
        undelivered: messages to people that no messenger took, the oldest first; the next flow sends them.
    """

    catalog: str
    version: int
    num_images: int
    num_vectors: int
    statuses: dict[str, int]
    decisions: dict[str, int]
    errors: dict[str, int]
    policies: dict[str, int]
    models: dict[str, dict[str, int]]
    alt_texts: dict[str, int]
    flagged: tuple[Example, ...]
    examples: tuple[Example, ...]
    runs: tuple[RunLine, ...]
    undelivered: tuple[Message, ...] = ()


def summarize(config: CatalogConfig) -> CatalogSummary:
    """Reads the counts and a few examples, file by file; vectors are counted, not read.

    Raises:
        CatalogError: there is no catalog, or another version of vlmflow wrote it.
    """
    catalog = Catalog.open(config)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "decision", "errors", "policy", "alt")}
    models: dict[str, Counter[str]] = {task: Counter() for task in ("embed", "caption", "match", "answer")}
    flagged: list[Example] = []
    examples: list[Example] = []
    columns = [*Example.model_fields, "errors", *_COUNTED[2:]]
    for batch in catalog.image_batches(columns):
        for name in ("status", "decision"):
            add_counts(counts[name], batch[name])
        add_counts(counts["errors"], error_classes(batch["errors"])[1])
        add_counts(counts["policy"], policy_names(batch))
        add_counts(counts["alt"], _rules(batch))
        for task, counter in models.items():
            add_counts(counter, batch[f"{task}_model"])
        _gather(flagged, batch.filter(pc.is_in(batch["decision"], pa.array(["review", "block"]))))
        _gather(examples, batch.filter(pc.equal(batch["decision"], "allow")))
    return CatalogSummary(
        catalog=catalog.uri,
        version=catalog.version,
        num_images=sum(counts["status"].values()),
        num_vectors=sum(batch.num_rows for batch in catalog.embedding_batches(["image_id"])),
        statuses=dict(counts["status"].most_common()),
        decisions=dict(counts["decision"].most_common()),
        errors=dict(counts["errors"].most_common()),
        policies=dict(counts["policy"].most_common()),
        models={task: dict(counter.most_common()) for task, counter in models.items() if counter},
        alt_texts=dict(counts["alt"].most_common()),
        flagged=tuple(flagged),
        examples=tuple(examples),
        runs=tuple(_run_lines(catalog)),
        undelivered=_undelivered(config),
    )


def _undelivered(config: CatalogConfig) -> tuple[Message, ...]:
    """The messages that are kept; none where they are refused, to a role that may read the tables alone."""
    try:
        return tuple(kept.message for kept in MessageStore(Folder(config)).left())
    except StorageAccessError as error:
        logger.warning("whether %s/ keeps messages that nobody was sent is not known: %s", MESSAGES, error)
        return ()


def _rules(rows: pa.Table) -> pa.ChunkedArray:
    """The rule that each alternative text breaks, in words where it breaks none; null where there is no caption."""
    fine = pc.if_else(pc.is_valid(rows["alt_text"]), pa.scalar(_ALT_TEXT_IS_FINE), pa.scalar(None, pa.string()))
    return pc.coalesce(rows["alt_text_rule"], fine)


def _gather(examples: list[Example], rows: pa.Table) -> None:
    wanted = _NUM_EXAMPLES - len(examples)
    if wanted > 0:
        names = [name for name in Example.model_fields if name in schema.IMAGES.names]
        examples.extend(Example(**row) for row in rows.select(names).slice(0, wanted).to_pylist())


def _run_lines(catalog: Catalog) -> list[RunLine]:
    """The newest runs. What one has committed that did not come to its end, or has not yet, the table tells."""
    runs = list(islice(catalog.runs.newest(), _NUM_RUNS))
    found = (enrichment_of(run.record) for run in runs if run.record.get("finished_at") is None)
    counted = {report.run_id: report for report in with_counts(catalog, [one for one in found if one is not None])}
    return [_run_line(run, counted.get(run.run_id)) for run in runs]


def _run_line(run: RunInfo, counted: RunReport | None) -> RunLine:
    record = run.record if counted is None else run.record | counted.model_dump(include={"num_added", "num_replaced"})
    # A record says `running` until its run ends: of one that was killed, for ever.
    end = str(record.get("state", record.get("status", run.state)))
    return RunLine(
        run_id=run.run_id,
        state=end if run.has_ended and end != "running" else run.state,
        started_at=str(record.get("started_at", "")),
        num_added=int(record.get("num_added", 0)),
        num_replaced=int(record.get("num_replaced", 0)),
        num_columns_updated=int(record.get("num_columns_updated", 0)),
        num_moved=int(record.get("num_moved", 0)),
        images_per_s=float(record.get("images_per_s", 0.0)),
        message=str(record.get("message", "")),
        operation=record.get("operation"),
    )
