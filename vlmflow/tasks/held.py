"""Pixels of a batch that lie on the device already: put there once, before the tasks, which all find them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

# The number of a row in the batch whose pixels are held: tasks see some of its rows, in some order.
HELD_ROW = "held_row"


@dataclass(frozen=True)
class HeldViews:
    """The views of a batch for one request.

    Attributes:
        pixels: (V, 3, S, S) uint8.
        starts: (N,) where each row's views begin.
        counts: (N,) how many each row has; 0: it was not decoded.
    """

    pixels: torch.Tensor
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def of(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The views of some rows, as :func:`vlmflow.tasks.pixels.all_views` gives them; a slice where they lie so.

        Raises:
            ValueError: a row has no pixels.
        """
        starts, counts = self.starts[rows], self.counts[rows]
        if len(rows) and counts.min() == 0:
            raise ValueError(f"row {int(counts.argmin())} of the batch has no pixels")
        offsets = np.concatenate([[0], np.cumsum(counts)])
        if len(rows) and np.array_equal(starts, starts[0] + offsets[:-1]):
            return self.pixels[starts[0] : starts[0] + offsets[-1]], offsets
        places = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        return self.pixels[torch.from_numpy(places).to(self.pixels.device)], offsets


_held: ContextVar[Mapping[str, HeldViews] | None] = ContextVar("held", default=None)


@contextmanager
def holding(views: Mapping[str, HeldViews]) -> Iterator[None]:
    """Lets the tasks of this thread find the pixels by the keys of their requests."""
    token = _held.set(views)
    try:
        yield
    finally:
        _held.reset(token)


def held_views(batch: pa.Table, key: str) -> tuple[torch.Tensor, NDArray[np.int64]] | None:
    """The views of the batch's rows, if they are held.

    Raises:
        ValueError: a row has no pixels.
    """
    held = (_held.get() or {}).get(key)
    if held is None or HELD_ROW not in batch.column_names:
        return None
    rows: NDArray[Any] = np.asarray(batch[HELD_ROW].combine_chunks())
    return held.of(rows)
