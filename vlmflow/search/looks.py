"""Perceptual hashes that differ in few bits, found by bands of bits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.search.leaders import few_first
from vlmflow.search.live import Positions

# Of the 64 bits of two perceptual hashes, how many may differ. Five bands of bits: with four that differ, one band is
# equal, so only hashes that share a band are compared.
MAX_BITS = 4
_BANDS = (0, 13, 26, 39, 52, 64)
_MAX_CELLS = 1 << 20  # hashes that are compared at a time, each with a head


class Looks:
    """Nearness of perceptual hashes. I: hashes.

    Args:
        values: (I,) uint64, in the order in which they may become heads.
    """

    def __init__(self, values: NDArray[np.uint64]) -> None:
        self._values = values
        every = np.arange(len(values))
        self._bands = [_Band.of(values, every, low, high) for low, high in pairwise(_BANDS)]
        self._num_in_vain = 0  # comparisons with hashes that have an owner

    def __len__(self) -> int:
        return len(self._values)

    def among(self, items: Positions) -> Mask:
        """As :class:`vlmflow.search.leaders.Nearness`."""
        values = self._values[items]
        near: Mask = np.bitwise_count(values[:, None] ^ values[None, :]) <= MAX_BITS
        return near

    def claim(self, heads: Positions, owners: Positions, start: int) -> None:
        """As :class:`vlmflow.search.leaders.Nearness`."""
        for some in few_first(heads):
            for band in self._bands:
                self._claim(band, some, owners)
        # Those that are taken are dropped when looking at them has cost what it costs to drop them.
        if self._num_in_vain > 4 * len(self):
            self._bands = [band.kept(owners == len(self)) for band in self._bands]
            self._num_in_vain = 0

    def equal_bits(self, left: Positions, right: Positions) -> NDArray[np.float32]:
        """(P,) the share of equal bits of pairs of hashes."""
        bits = np.bitwise_count(self._values[left] ^ self._values[right])
        return np.asarray(1 - bits / 64, np.float32)

    def _claim(self, band: _Band, heads: Positions, owners: Positions) -> None:
        firsts, counts = band.sharing(self._values[heads])
        ends = np.cumsum(counts)
        at = 0
        while at < len(heads):
            done = int(ends[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(ends, done + _MAX_CELLS, side="right")))
            rows = np.repeat(np.arange(at, stop), counts[at:stop])
            places = firsts[rows] + np.arange(len(rows)) - (ends[rows] - counts[rows] - done)
            near = np.bitwise_count(self._values[heads[rows]] ^ band.values[places]) <= MAX_BITS
            items = band.items[places]
            self._num_in_vain += int(np.count_nonzero(owners[items] < heads[0]))
            np.minimum.at(owners, items[near], heads[rows[near]])
            at = stop


@dataclass(frozen=True, eq=False)
class _Band:
    """Some bits of hashes: those that are equal in them lie next to each other."""

    low: int
    high: int
    keys: NDArray[np.uint64]
    items: Positions
    values: NDArray[np.uint64]

    @classmethod
    def of(cls, values: NDArray[np.uint64], items: Positions, low: int, high: int) -> _Band:
        keys = _bits(values, low, high)
        order = np.argsort(keys, kind="stable")
        return cls(low, high, keys[order], items[order], values[order])

    def sharing(self, values: NDArray[np.uint64]) -> tuple[Positions, Positions]:
        """Where those begin that share the band with each of some hashes, and how many they are."""
        keys = _bits(values, self.low, self.high)
        firsts = np.searchsorted(self.keys, keys, side="left")
        return firsts, np.searchsorted(self.keys, keys, side="right") - firsts

    def kept(self, marks: Mask) -> _Band:
        keep = marks[self.items]
        return _Band(self.low, self.high, self.keys[keep], self.items[keep], self.values[keep])


def _bits(values: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    return (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
