"""Review by people: a queue of images out of a catalog, and their verdicts into it."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.reviews import EVENT
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.moderation.queue import COLUMNS, QueueSizes, make_queue
from vlmflow.moderation.review_files import Word, check_suffix, read_words, write_queue

_ROW = ("image_id", "uri", "content_hash")


class QueueReport(Frozen):
    """What went into a queue.

    Attributes:
        queues: images by the reason why they are in it.
    """

    catalog: str
    output: str
    num_images: int
    queues: dict[str, int]


class ReviewReport(Frozen):
    """What became of verdicts.

    Attributes:
        num_verdicts: that were read and are about images of the catalog as they are.
        num_new: of these, verdicts that the catalog did not have before.
        left_out: verdicts that do not count, by reason.
        num_changed: rows under another verdict than before.
        num_waiting: verdicts of this and earlier imports on bytes that the catalog does not hold now.
        flips: rows by change of their decision.
    """

    catalog: str
    source: str
    num_verdicts: int
    num_new: int
    left_out: dict[str, int]
    num_changed: int
    num_waiting: int
    flips: dict[str, int]


def export_queue(config: CatalogConfig, output: Path, *, sizes: QueueSizes | None = None, seed: int = 0) -> QueueReport:
    """Writes the images that a person should look at; by the suffix Parquet, CSV or JSON for Label Studio.

    Raises:
        ReviewError: the file cannot be written.
        CatalogError: there is no catalog.
    """
    check_suffix(output)
    catalog = Catalog.open(config)
    queue = make_queue(catalog.image_batches(COLUMNS), sizes or QueueSizes(), seed)
    write_queue(output, queue)
    counts = Counter(queue["queue"].to_pylist())
    return QueueReport(catalog=catalog.uri, output=str(output), num_images=queue.num_rows, queues=dict(counts))


def import_verdicts(config: CatalogConfig, source: Path, *, reviewer: str | None = None) -> ReviewReport:
    """Takes people's verdicts into a catalog, and into the rows that they are about.

    A verdict is bound to the bytes that were judged: those of ``content_hash``, else those that the catalog holds now.
    It is the row's decision until the bytes change, whatever models and policies say meanwhile. Of several on the same
    bytes the newest counts. Importing a file again changes nothing.

    Args:
        reviewer: of rows that name none.

    Raises:
        ReviewError: the file cannot be used; nothing was taken.
        CatalogError: there is no catalog, or other writers are always first.
    """
    words = read_words(source, reviewer, dt.datetime.now(dt.UTC))
    catalog = Catalog.open(config)
    events, left_out = _events(words, catalog.image_batches(_ROW))
    before = catalog.reviews.events().num_rows
    catalog.reviews.add(events)
    num_new = catalog.reviews.events().num_rows - before
    result = catalog.apply_verdicts()
    return ReviewReport(
        catalog=catalog.uri,
        source=str(source),
        num_verdicts=events.num_rows,
        num_new=num_new,
        left_out=dict(left_out),
        num_changed=result.num_changed,
        num_waiting=result.num_waiting,
        flips=result.flips,
    )


def _events(words: list[Word], batches: Iterable[pa.Table]) -> tuple[pa.Table, Counter[str]]:
    """The words on images of the catalog as they are, bound to their bytes; and why others do not count."""
    wanted = pa.array(sorted({word.image for word in words}), pa.string())
    found: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        hits = pc.or_(pc.is_in(batch["image_id"], value_set=wanted), pc.is_in(batch["uri"], value_set=wanted))
        for row in batch.filter(hits).to_pylist():
            for name in {row["image_id"], row["uri"]}:
                found.setdefault(name, []).append(row)
    left_out: Counter[str] = Counter()
    events: list[dict[str, Any]] = []
    for word in words:
        rows = found.get(word.image, [])
        reason = _reason_to_leave_out(word, rows)
        if reason is not None:
            left_out[reason] += 1
            continue
        events.append(
            {
                "image_id": rows[0]["image_id"],
                "content_hash": rows[0]["content_hash"],
                **{name: getattr(word, name) for name in EVENT.names if name not in ("image_id", "content_hash")},
            }
        )
    return pa.Table.from_pylist(events, schema=EVENT), left_out


def _reason_to_leave_out(word: Word, rows: list[dict[str, Any]]) -> str | None:
    if not rows:
        return "image is not in the catalog"
    if len(rows) > 1:
        return "uri stands for several images: give image_id"
    if rows[0]["content_hash"] is None:
        return "image was never read"
    if word.content_hash is not None and word.content_hash != rows[0]["content_hash"]:
        return "image has changed since (content_hash differs)"
    return None
