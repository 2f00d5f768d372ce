"""One reference for each image, however often a manifest lists it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.errors import SourceError

_EXAMPLES = 3
_OWN = ("key", "text", "source")  # what may differ between rows of one image


class UniqueReferences:
    """References with each image once, its first row.

    Args:
        batches: reads the references from the start, each time it is called. It is called again and again, so that
            only halves of identities are in memory (8 bytes an image, twice that for a moment), not the rows.

    Attributes:
        num_repeated: further rows of the images, known as soon as the first batch is there.
    """

    def __init__(self, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._batches = batches
        self.num_repeated = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """Yields them in batches.

        Raises:
            SourceError: rows of one image differ, before anything is yielded.
        """
        repeated = self._repeated()
        if len(repeated) == 0:
            yield from self._batches()
            return
        _refuse_conflicts(self._batches, repeated)
        seen: set[str] = set()
        for batch in self._batches():
            keep = []
            is_repeated = pc.is_in(batch["image_id"], repeated).to_pylist()
            for image_id, again in zip(batch["image_id"].to_pylist(), is_repeated, strict=True):
                keep.append(not again or image_id not in seen)
                if again:
                    seen.add(image_id)
            yield batch.filter(pa.array(keep, pa.bool_()))

    def _repeated(self) -> pa.Array:
        """The ids that come more than once; counts how often they come again."""
        halves = np.concatenate([np.empty(0, np.uint64), *(_halves(batch) for batch in self._batches())])
        halves.sort()
        again = np.unique(halves[1:][halves[1:] == halves[:-1]])
        del halves
        if not len(again):
            self.num_repeated = 0
            return pa.array([], pa.string())
        # As good as all of these are equal to the end.
        alike = [batch["image_id"].filter(pa.array(_are_in(_halves(batch), again))) for batch in self._batches()]
        counts = pa.chunked_array(alike, pa.string()).value_counts()
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        self.num_repeated = (pc.sum(repeated.field("counts")).as_py() or 0) - len(repeated)
        return repeated.field("values")


def _halves(batch: pa.RecordBatch) -> NDArray[np.uint64]:
    """The first 64 bits of each id, in the byte order of this machine."""
    data = bytes.fromhex("".join(batch["image_id"].to_pylist()))
    return np.frombuffer(data, np.uint64)[::2].copy()


def _are_in(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[at] == values
    return found


def _refuse_conflicts(batches: Callable[[], Iterator[pa.RecordBatch]], repeated: pa.Array) -> None:
    first: dict[str, bytes] = {}
    conflicting: dict[str, str] = {}
    for row in _rows_of(batches, repeated):
        digest = blake2b(repr(_own(row)).encode(), digest_size=16).digest()
        if first.setdefault(row["image_id"], digest) != digest:
            conflicting[row["image_id"]] = row["uri"]
            if len(conflicting) == _EXAMPLES:
                break
    if conflicting:
        examples = "; ".join(
            f"{uri} ({_difference(batches, image_id)})" for image_id, uri in sorted(conflicting.items())
        )
        remedy = "Make their columns equal, or name a source.key_column that tells them apart."
        raise SourceError(f"rows with the same uri differ in other columns: {examples}", remedy=remedy)


def _rows_of(batches: Callable[[], Iterator[pa.RecordBatch]], image_ids: pa.Array) -> Iterator[dict[str, Any]]:
    for batch in batches():
        yield from batch.filter(pc.is_in(batch["image_id"], image_ids)).to_pylist()


def _own(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in _OWN}


def _difference(batches: Callable[[], Iterator[pa.RecordBatch]], image_id: str) -> str:
    """Shows one column in which rows of an image differ, with its values."""
    rows = [_flat(row) for row in _rows_of(batches, pa.array([image_id]))]
    for name in rows[0]:
        values = list(dict.fromkeys(repr(row[name]) for row in rows))
        if len(values) > 1:
            return f"{name}: {' and '.join(value[:60] for value in values[:2])}"
    raise AssertionError("rows that differ have a column in which they do")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    own = _own(row)
    return {**(own.pop("source") or {}), **own}
