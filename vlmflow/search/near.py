"""Pairs of images whose vectors are near, of more images than can be compared each with each: by the index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.search.index import HALF_ERROR
from vlmflow.search.live import Positions
from vlmflow.search.searcher import Searcher

Pairs: TypeAlias = tuple[Positions, Positions, NDArray[np.float32]]  # (P,) numbers of live rows, twice; cosines

_AT_ONCE = 1 << 15  # pairs whose vectors are compared: 128 MiB at 512 dimensions


def near_pairs(searcher: Searcher, model: str, wanted: Mask, threshold: float) -> Iterator[Pairs]:
    """Pairs of marked rows whose cosine reaches a threshold; a pair may come twice, turned around.

    Both of a pair are in one cell of the index or in two that are close, or else they are not found. Where half
    precision leaves open whether the threshold is reached, the stored vectors are compared.

    Raises:
        SearchError: the index does not cover all of these rows.
    """
    segments = searcher.covering(model, wanted)
    undecided: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
    for positions, vectors in searcher.vectors(model, wanted):
        for segment in segments:
            rows, others, scores = segment.neighbours(np.ascontiguousarray(vectors), threshold - HALF_ERROR)
            firsts = positions[rows]
            keep = wanted[others] & (others != firsts)
            sure = keep & (scores >= threshold + HALF_ERROR)
            yield firsts[sure], others[sure], scores[sure]
            undecided.append(np.sort(np.stack([firsts, others])[:, keep & ~sure], axis=0))
    pairs = np.unique(np.concatenate(undecided, axis=1), axis=1)
    if pairs.size:
        yield from _compared(searcher, model, wanted, pairs, threshold)


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
