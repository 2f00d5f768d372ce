"""Rows that are equal in what they are compared by: of each such class only one is compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmflow.search.live import Positions

Scored: TypeAlias = tuple[Positions, NDArray[np.float32]]  # a group, its head in front; likeness with the head


@dataclass(frozen=True, eq=False)
class Equals:
    """Keys, each once, and the rows that have them. U: keys."""

    keys: NDArray[np.uint64]  # (U,)
    rows: Positions  # those of each key next to each other, the first by rank in front
    starts: NDArray[np.int64]  # (U,) where those of each key begin
    counts: NDArray[np.int64]  # (U,) how many they are
    ranks: NDArray[np.int64]  # (U,) of the first of them

    @classmethod
    def of(cls, keys: NDArray[np.uint64], rows: Positions, ranks: NDArray[np.int64]) -> Equals:
        """Classes of rows by their keys.

        Args:
            keys: (P,) of the rows.
            rows: (P,) numbers of live rows.
            ranks: (N,) of all live rows.
        """
        order = np.lexsort((ranks[rows], keys))
        rows = rows[order]
        values, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
        return cls(values, rows, starts, counts, ranks[rows[starts]])

    def whole(self, groups: Sequence[Scored], ranks: NDArray[np.int64]) -> list[Scored]:
        """Groups of rows from groups of numbers of keys; a key that is in none and has several rows is one too."""
        alone = np.ones(len(self.keys), np.bool_)
        for members, _ in groups:
            alone[members] = False
        equal = [(np.array([key]), np.ones(1, np.float32)) for key in np.flatnonzero(alone & (self.counts > 1))]
        by_rows = [self._rows_of(*group) for group in [*groups, *equal]]
        return sorted(by_rows, key=lambda group: (-len(group[0]), int(ranks[group[0][0]])))

    def _rows_of(self, keys: Positions, scores: NDArray[np.float32]) -> Scored:
        """The rows of a group of keys, the head's first row in front, and the score of each."""
        spans = zip(self.starts[keys].tolist(), self.counts[keys].tolist(), strict=True)
        rows = np.concatenate([self.rows[start : start + count] for start, count in spans])
        each = np.repeat(scores, self.counts[keys])
        order = 1 + np.lexsort((rows[1:], -each[1:]))
        return np.concatenate([rows[:1], rows[order]]), np.concatenate([each[:1], each[order]])
