"""Which images a person should look at: near a threshold, in disagreement with themselves, or drawn at random."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import as_floats, flat
from vlmflow.catalog.judged import equal_reason
from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.masks import Mask, equal, is_valid
from vlmflow.catalog.rows import MISSING, UNREADABLE
from vlmflow.moderation.contradictions import contradictions, count_contradictions

# What the queue reads of a row.
COLUMNS = (
    "image_id",
    "uri",
    "content_hash",
    "status",
    "decision",
    "decision_reason",
    "labels",
    "caption",
    "caption_itm",
    "text_itm",
)
QUEUE = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("content_hash", pa.string()),  # what a verdict is bound to
        ("queue", pa.string()),  # near, disagreement or random
        ("priority", pa.float64()),  # near: the distance; disagreement: how many signs; random: none
        ("why", pa.string()),
        ("weight", pa.float64()),  # of the random sample: the images that each stands for; null elsewhere
        ("status", pa.string()),
        ("decision", pa.string()),  # at present
        ("decision_reason", pa.string()),
        ("labels", pa.string()),  # those that are not allowed, or the nearest: name, value and thresholds
        ("caption", pa.string()),
        ("text_itm", pa.float32()),
        # For the person:
        ("verdict", pa.string()),  # allow, review, block; none takes an earlier one back
        ("label", pa.string()),
        ("value", pa.string()),
        ("reviewer", pa.string()),
        ("reason", pa.string()),
    ]
)
_BETWEEN = " "  # of an image's id and the hash of its bytes, as one key
_NUM_LABELS_SHOWN = 3
_AT_ONCE = 1024  # rows that are held against the worst of those that are kept


@dataclass(frozen=True)
class QueueSizes:
    """How many images of each kind."""

    near: int = 100
    disagreement: int = 50
    random: int = 50


@dataclass
class _Kept:
    """The best of a kind so far: a heap whose top is the worst."""

    size: int
    heap: list[tuple[float, str, int, dict[str, Any]]] = field(default_factory=list)
    num_offered: int = 0

    def offer(self, merit: float, row: dict[str, Any]) -> None:
        self.num_offered += 1  # another program may have written an image's row twice, and rows have no order
        entry = (merit, row["image_id"], self.num_offered, row)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif self.size and merit > self.heap[0][0]:
            heapq.heapreplace(self.heap, entry)

    def would_take(self, merits: NDArray[np.float64]) -> Mask:
        if len(self.heap) < self.size:
            return np.isfinite(merits)
        return np.isfinite(merits) & (merits > (self.heap[0][0] if self.size else np.inf))

    def best_first(self) -> Iterator[tuple[float, dict[str, Any]]]:
        for merit, _, _, row in sorted(self.heap, key=lambda entry: (-entry[0], entry[1])):
            yield merit, row


class Queue(NamedTuple):
    """Images for review. ``num_labelled``: how many were left out because labels were said of them, and no verdict."""

    images: pa.Table  # as QUEUE
    num_labelled: int


def make_queue(
    batches: Iterable[pa.Table], sizes: QueueSizes, seed: int = 0, labelled: Collection[tuple[str, str]] = ()
) -> Queue:
    """Chooses images for review, each once: random ones first, so that their sample stays one.

    An image with a verdict on its present bytes is left out, one whose labels somebody has judged, and one that nobody
    can look at: missing, or unreadable. The random sample stands for those that are left: what is left out stands for
    itself, or, drawn at random before, for the catalog of then.

    Args:
        batches: live rows with :data:`COLUMNS`.
        seed: of the random sample: the same seed draws the same images of a catalog, or, once these are labelled, those
            that come next.
        labelled: images, with the hash of their bytes, of which labels were said.
    """
    said = pa.array([f"{image_id}{_BETWEEN}{bytes_}" for image_id, bytes_ in labelled], pa.string())
    random = _Kept(sizes.random)
    # With some to spare, in place of those that are in the queue already.
    disagreement = _Kept(sizes.disagreement and sizes.disagreement + sizes.random)
    near = _Kept(sizes.near and sizes.near + sizes.disagreement + sizes.random)
    num_images = num_labelled = 0
    for batch in batches:
        # Rows that were good before keep their hash.
        gone = equal(batch["status"], MISSING) | equal(batch["status"], UNREADABLE)
        open_rows = batch.filter(pa.array(~equal_reason(batch) & is_valid(batch["content_hash"]) & ~gone))
        pairs = pc.binary_join_element_wise(open_rows["image_id"], open_rows["content_hash"], _BETWEEN)
        num_before = open_rows.num_rows
        open_rows = open_rows.filter(pc.invert(pc.is_in(pairs, value_set=said)))
        num_images += open_rows.num_rows
        num_labelled += num_before - open_rows.num_rows
        counts = count_contradictions(open_rows).astype(np.float64)
        merits = (
            (random, _draws(open_rows, seed)),
            (near, -threshold_gaps(open_rows)),
            (disagreement, np.where(counts > 0, counts, -np.inf)),
        )
        for start in range(0, open_rows.num_rows, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            takes = np.logical_or.reduce([kept.would_take(of_all[part]) for kept, of_all in merits])
            for number in (start + np.flatnonzero(takes)).tolist():
                shown = open_rows.slice(number, 1).to_pylist()[0]
                for kept, of_all in merits:
                    if kept.would_take(of_all[number : number + 1])[0]:
                        kept.offer(float(of_all[number]), shown)
    chosen: dict[str, dict[str, Any]] = {}
    weight = num_images / max(1, len(random.heap))
    for kind, kept, size in (
        ("random", random, sizes.random),
        ("disagreement", disagreement, sizes.disagreement),
        ("near", near, sizes.near),
    ):
        others = [(merit, row) for merit, row in kept.best_first() if row["image_id"] not in chosen]
        for merit, row in others[:size]:
            chosen[row["image_id"]] = _entry(kind, merit, row, weight if kind == "random" else None)
    order = {"near": 0, "disagreement": 1, "random": 2}
    rows = sorted(chosen.values(), key=lambda entry: order[entry["queue"]])
    return Queue(pa.Table.from_pylist(rows, schema=QUEUE), num_labelled)


def threshold_gaps(rows: pa.Table) -> NDArray[np.float64]:
    """(N,) how near the nearest label is to one of its thresholds; infinite without scores."""
    labels = flat(rows["labels"])
    items = pc.list_flatten(labels)
    parents = np.asarray(pc.list_parent_indices(labels), np.int64)
    values = as_floats(pc.coalesce(pc.struct_field(items, "probability"), pc.struct_field(items, "score")))
    gaps = [np.abs(values - as_floats(pc.struct_field(items, f"{name}_threshold"))) for name in ("review", "block")]
    nearest = np.fmin(*gaps)
    out = np.full(rows.num_rows, np.inf)
    np.minimum.at(out, parents, np.where(np.isnan(nearest), np.inf, nearest))
    return out


def _draws(rows: pa.Table, seed: int) -> NDArray[np.float64]:
    """(N,) a number per image, uniform in [0, 1), that depends on its id and the seed alone."""
    scale = float(1 << 128)
    ids = rows["image_id"].to_pylist()
    return np.array([int(digest_of(str(seed), image_id), 16) / scale for image_id in ids], np.float64)


def _entry(kind: str, merit: float, row: dict[str, Any], weight: float | None) -> dict[str, Any]:
    labels = row["labels"] or []
    shown = [label for label in labels if label["decision"] != "allow"] or labels
    shown = sorted(shown, key=lambda label: -(_value(label) or 0.0))[:_NUM_LABELS_SHOWN]
    priority = {"near": -merit, "disagreement": merit}.get(kind)
    return {
        **{name: row[name] for name in ("image_id", "uri", "content_hash", "status", "decision", "decision_reason")},
        "queue": kind,
        "priority": priority,
        "why": "; ".join(contradictions(row)) or None if kind == "disagreement" else None,
        "weight": weight,
        "labels": "; ".join(_shown(label) for label in shown) or None,
        "caption": row["caption"],
        "text_itm": row["text_itm"],
    }


def _value(label: dict[str, Any]) -> float | None:
    value = label["probability"] if label["probability"] is not None else label["score"]
    return None if value is None else float(value)


def _shown(label: dict[str, Any]) -> str:
    value, block = _value(label), label["block_threshold"]
    limits = f"review {label['review_threshold']:.2f}" + ("" if block is None else f", block {block:.2f}")
    who = f" by {label['detector']}" if label["detector"] else ""
    return f"{label['label']}{who} {'-' if value is None else f'{value:.2f}'} ({limits})"
