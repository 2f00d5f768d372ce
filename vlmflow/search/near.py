"""Vectors that are near to each other: of few images each with each, of more by the index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.search.alone import have_near
from vlmflow.search.exact import Block
from vlmflow.search.index import HALF_ERROR, OpenSegment
from vlmflow.search.leaders import few_first
from vlmflow.search.live import Positions
from vlmflow.workspace import in_our_words

ROUNDING = 1e-6  # of the cosine of two vectors in single precision: equal ones reach a threshold of 1
_OTHERS = 8_192  # that are compared at a time, with the heads: 32 MiB of cosines
_PROBES = 16  # cells that a head looks into at first
_WIDER = 4  # so many times as many then, for a head that has found some there
_AT_ONCE = 1 << 15  # pairs whose vectors are compared: 128 MiB at 512 dimensions


class NearVectors:
    """Nearness by the cosine of stored vectors. I: vectors.

    Args:
        vectors: (I, D) of unit length, in the order in which they may become heads.
        threshold: least cosine.
    """

    def __init__(self, vectors: NDArray[np.float32], threshold: float) -> None:
        self._vectors, self._least = vectors, threshold - ROUNDING

    def __len__(self) -> int:
        return len(self._vectors)

    def among(self, items: Positions) -> Mask:
        """As :class:`vlmflow.search.leaders.Nearness`."""
        vectors = self._vectors[items]
        near: Mask = vectors @ vectors.T >= self._least
        return near

    def claim(self, heads: Positions, owners: Positions, start: int) -> None:
        """As :class:`vlmflow.search.leaders.Nearness`."""
        queries = self._vectors[heads]
        free = start + np.flatnonzero(owners[start:] == len(self))
        for at in range(0, len(free) if len(heads) else 0, _OTHERS):
            others = free[at : at + _OTHERS]
            near = queries @ self._vectors[others].T >= self._least
            firsts = near.argmax(axis=0)
            found = near[firsts, np.arange(len(others))]
            owners[others[found]] = heads[firsts[found]]

    def cosines(self, left: Positions, right: Positions) -> NDArray[np.float32]:
        """(P,) of pairs of vectors."""
        found = np.empty(len(left), np.float32)
        for at in range(0, len(left), _AT_ONCE):
            part = slice(at, at + _AT_ONCE)
            np.einsum("pd,pd->p", self._vectors[left[part]], self._vectors[right[part]], out=found[part])
        return found


class IndexedVectors(NearVectors):
    """The same where there are too many to compare each with each: the index proposes whom to compare.

    An image that the index has in a cell that is not close to a head is not found. Where half precision leaves open
    whether the threshold is reached, the stored vectors are compared.

    Args:
        segments: the index; it covers all of the vectors.
        items: (N,) of live rows, the number of the vector; -1: the row has none.
    """

    def __init__(
        self, vectors: NDArray[np.float32], threshold: float, segments: Sequence[OpenSegment], items: Positions
    ) -> None:
        super().__init__(vectors, threshold)
        self._segments = segments
        self._items = [np.where(s.segment.positions >= 0, items[s.segment.positions], -1) for s in segments]
        self._marks = [held >= 0 for held in self._items]  # those that may still be claimed
        # Where each vector is: its segment, and its place in it.
        self._places = np.empty((len(vectors), 2), np.int64)
        for number, held in enumerate(self._items):
            places = np.flatnonzero(held >= 0)
            self._places[held[places], 0], self._places[held[places], 1] = number, places
        self._start = 0
        # Most images have no other near them, and need not be looked up.
        pairs = zip(segments, self._items, strict=True)
        self._have_near = [have_near(segment, held, vectors, self._least, _PROBES) for segment, held in pairs]

    def claim(self, heads: Positions, owners: Positions, start: int) -> None:
        """As :class:`vlmflow.search.leaders.Nearness`."""
        self._unmark(np.arange(self._start, start))
        self._start = start
        for some in few_first(heads):
            for segment, held, marks, near in zip(
                self._segments, self._items, self._marks, self._have_near, strict=True
            ):
                marks[self._claim(segment, held, marks, some[near[some]], owners)] = False

    def _claim(
        self, segment: OpenSegment, held: Positions, marks: Mask, heads: Positions, owners: Positions
    ) -> Positions:
        """Looks into few cells, and into more of them for heads that find more there: a dense group fills many.

        Returns:
            The places in the segment of what was found; some are there more than once.
        """
        counts, probes = np.zeros(len(heads), np.int64), _PROBES
        claimed = [np.empty(0, np.int64)]
        while len(heads):
            rows, at, scores = segment.neighbours(self._vectors[heads], self._least - HALF_ERROR, marks, probes)
            firsts, others = heads[rows], held[at]
            near = scores >= self._least + HALF_ERROR
            near[~near] = self.cosines(firsts[~near], others[~near]) >= self._least
            np.minimum.at(owners, others[near], firsts[near])
            claimed.append(at[near])
            before, counts = counts, np.bincount(rows[near], minlength=len(heads))
            more = (counts > before) & (probes < segment.num_cells)
            heads, counts, probes = heads[more], counts[more], _WIDER * probes
        return np.concatenate(claimed)

    def _unmark(self, items: Positions) -> None:
        for number, marks in enumerate(self._marks):
            segments, places = self._places[items].T
            marks[places[segments == number]] = False


def to_disk(blocks: Iterator[Block], numbers: Positions, count: int, folder: Path) -> NDArray[np.float32]:
    """Vectors in an order of their own, in a file that is mapped into memory.

    Args:
        blocks: each vector once.
        numbers: (N,) of live rows, the place of the vector.
        count: how many vectors they are.

    Raises:
        WorkspaceError: there is no room for the file.
    """
    held = np.empty((0, 0), np.float32)
    for positions, vectors in blocks:
        if not len(held):
            path = folder / "vectors"
            with in_our_words(), path.open("wb") as file:
                # The room is taken now: where it ends while a mapped file is written to, the process is killed.
                os.posix_fallocate(file.fileno(), 0, count * vectors[:1].nbytes)
            held = np.memmap(path, np.float32, "r+", shape=(count, vectors.shape[1]))
        held[numbers[positions]] = vectors
    return held
