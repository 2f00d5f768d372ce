"""Leader clustering (Hartigan 1975, Clustering Algorithms, ch. 3): each item joins the first head that it is near to.

Items are numbered in the order in which they may become heads. One that is near to no head before it is a head itself.
Only heads are compared with what is still free, so a dense group of n items costs n comparisons, where it has n² pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from vlmflow.catalog.masks import Mask
from vlmflow.search.live import Positions

_WINDOW = 1_024  # items that are compared each with each
_FEWEST_HEADS = 8


class Nearness(Protocol):
    """Which items are near to each other. I: items."""

    def __len__(self) -> int: ...

    def among(self, items: Positions) -> Mask:
        """(J, J) of J items, each with each; of them an item and those after it count."""

    def claim(self, heads: Positions, owners: Positions, start: int) -> None:
        """Gives each item from ``start`` on its first head, of these and of those before, that it is near to.

        Args:
            owners: (I,) to be lowered, I where an item is near to no head before.
        """


def owners_of(nearness: Nearness) -> Positions:
    """(I,) the head that each item has joined; of a head itself."""
    count = len(nearness)
    owners = np.full(count, count, np.int64)
    for start in range(0, count, _WINDOW):
        stop = min(start + _WINDOW, count)
        free = start + np.flatnonzero(owners[start:stop] == count)
        near = np.triu(nearness.among(free), 1)
        for row in np.flatnonzero(near.any(axis=1)).tolist():
            if owners[free[row]] == count:
                others = free[near[row]]
                owners[others] = np.minimum(owners[others], free[row])
        heads = free[owners[free] == count]
        owners[heads] = heads
        if stop < count:
            nearness.claim(heads, owners, stop)
    return owners


def few_first(heads: Positions) -> Iterator[Positions]:
    """Heads in parts, each as large as all before it.

    What is near to a share q of all heads is free after k of them with a chance of (1 - q)^k. So of parts that grow
    like this each finds most items a few times at most, where all heads at once might each find all of a dense group.
    """
    start, stop = 0, _FEWEST_HEADS
    while start < len(heads):
        yield heads[start:stop]
        start, stop = stop, 2 * stop
