"""Pairs of images whose vectors are near, of more images than can be compared each with each: by the index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.errors import TooManyPairsError
from vlmflow.search.exact import Block
from vlmflow.search.index import HALF_ERROR
from vlmflow.search.live import Positions
from vlmflow.search.searcher import Searcher

Pairs: TypeAlias = tuple[Positions, Positions, NDArray[np.float32]]  # (P,) numbers of live rows, twice; cosines

MAX_PAIRS = 50_000_000  # a GiB of them
ROUNDING = 1e-6  # of the cosine of two vectors in single precision: equal ones reach a threshold of 1
_QUERIES = 1_024  # whose neighbours are looked for at once: each may have as many as there are images
_AT_ONCE = 1 << 15  # pairs whose vectors are compared: 128 MiB at 512 dimensions


def near_pairs(searcher: Searcher, model: str, wanted: Mask, threshold: float) -> Iterator[Pairs]:
    """Pairs of marked rows whose cosine reaches a threshold; a pair may come twice, turned around.

    Both of a pair are in one cell of the index or in two that are close, or else they are not found. Where half
    precision leaves open whether the threshold is reached, the stored vectors are compared.

    Raises:
        SearchError: the index does not cover all of these rows.
        TooManyPairsError: it is left open of too many pairs.
    """
    segments = searcher.covering(model, wanted)
    least, count = threshold - ROUNDING, len(wanted)
    undecided = _Numbers()  # each pair once, as one number
    for positions, vectors in _few_at_once(searcher.vectors(model, wanted)):
        for segment in segments:
            rows, others, scores = segment.neighbours(np.ascontiguousarray(vectors), least - HALF_ERROR)
            firsts = positions[rows]
            keep = wanted[others] & (others != firsts)
            sure = keep & (scores >= least + HALF_ERROR)
            yield firsts[sure], others[sure], scores[sure]
            left, right = np.sort(np.stack([firsts, others])[:, keep & ~sure], axis=0)
            undecided.add(left * count + right)
            check_pairs(len(undecided.merged), threshold)
    undecided.merge()
    check_pairs(len(undecided.merged), threshold)
    if undecided.merged.size:
        yield from _compared(searcher, model, wanted, np.stack(np.divmod(undecided.merged, count)), least)


class _Numbers:
    """Numbers that come in parts, each kept once.

    Attributes:
        merged: those of the parts that are merged, in order.
    """

    def __init__(self) -> None:
        self.merged = np.empty(0, np.int64)
        self._parts: list[NDArray[np.int64]] = []
        self._num_pending = 0

    def add(self, part: NDArray[np.int64]) -> None:
        self._parts.append(part)
        self._num_pending += len(part)
        if self._num_pending > len(self.merged):  # sorted for every part, they would take a time that grows as a square
            self.merge()

    def merge(self) -> None:
        self.merged = np.unique(np.concatenate([self.merged, *self._parts]))
        self._parts, self._num_pending = [], 0


def check_pairs(num_pairs: int, threshold: float) -> None:
    """Refuses more pairs than can be held.

    Raises:
        TooManyPairsError: they are more.
    """
    if num_pairs > MAX_PAIRS:
        raise TooManyPairsError(
            f"more than {MAX_PAIRS:,} pairs of images are closer than {threshold}",
            remedy="Raise --threshold of `vlmflow duplicates`, or narrow the images with its --where.",
        )


def _few_at_once(blocks: Iterator[Block]) -> Iterator[Block]:
    for positions, vectors in blocks:
        for start in range(0, len(positions), _QUERIES):
            yield positions[start : start + _QUERIES], vectors[start : start + _QUERIES]


def _compared(
    searcher: Searcher, model: str, wanted: Mask, pairs: NDArray[np.int64], threshold: float
) -> Iterator[Pairs]:
    """Those of (2, P) pairs whose stored vectors reach the threshold, both ways; these vectors are held in memory."""
    marks = np.zeros_like(wanted)
    marks[pairs] = True
    blocks = list(searcher.vectors(model, marks))
    vectors = np.concatenate([block[1] for block in blocks])
    places = np.empty(len(marks), np.int64)
    places[np.concatenate([block[0] for block in blocks])] = np.arange(len(vectors))
    for start in range(0, pairs.shape[1], _AT_ONCE):
        left, right = pairs[:, start : start + _AT_ONCE]
        scores = np.einsum("pd,pd->p", vectors[places[left]], vectors[places[right]])
        near = scores >= threshold
        yield (
            np.concatenate([left[near], right[near]]),
            np.concatenate([right[near], left[near]]),
            np.concatenate([scores[near], scores[near]]),
        )
