"""METEOR as it was first defined (Banerjee and Lavie 2005), with its first two stages: equal words, then equal stems.

It needs neither Java nor WordNet. Its values are not those of METEOR 1.5, which also knows synonyms and paraphrases and
weighs otherwise: hence its name in reports, METEOR-2005.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import snowballstemmer

from vlmflow.evaluation.metrics.captions import Words

_RECALL_WEIGHT = 9  # recall counts nine times as much as precision
_MAX_PENALTY, _PENALTY_POWER = 0.5, 3


def meteor_2005(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The mean over captions, each by the reference that suits it best; in [0, 1]."""
    best = [max(_score(one, other) for other in several) for one, several in zip(candidates, references, strict=True)]
    return float(np.mean(best))


def _score(candidate: Words, reference: Words) -> float:
    pairs = _align(candidate, reference)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(candidate), len(pairs) / len(reference)
    mean = (1 + _RECALL_WEIGHT) * precision * recall / (recall + _RECALL_WEIGHT * precision)
    ordered = sorted(pairs)
    breaks = sum((here[0] + 1, here[1] + 1) != there for here, there in pairwise(ordered))
    return mean * (1 - _MAX_PENALTY * ((breaks + 1) / len(pairs)) ** _PENALTY_POWER)


def _align(candidate: Words, reference: Words) -> list[tuple[int, int]]:
    """Pairs of places, each used once: of equal words first, then of equal stems, the longest runs first."""
    pairs: list[tuple[int, int]] = []
    free = set(range(len(candidate))), set(range(len(reference)))
    stems = [_stem(word) for word in candidate], [_stem(word) for word in reference]
    for mine, theirs in ((candidate, reference), stems):
        while run := _longest_run(mine, theirs, *free):
            pairs += run
            free[0].difference_update(at for at, _ in run)
            free[1].difference_update(at for _, at in run)
    return pairs


def _longest_run(mine: Words, theirs: Words, free: set[int], their_free: set[int]) -> list[tuple[int, int]]:
    best: list[tuple[int, int]] = []
    for start in sorted(free):
        for their_start in sorted(their_free):
            length = 0
            while (
                start + length in free
                and their_start + length in their_free
                and mine[start + length] == theirs[their_start + length]
            ):
                length += 1
            if length > len(best):
                best = [(start + step, their_start + step) for step in range(length)]
    return best


@cache
def _stem(word: str) -> str:
    stem: str = _stemmer().stemWord(word)
    return stem


@cache
def _stemmer() -> snowballstemmer.EnglishStemmer:
    return snowballstemmer.stemmer("english")
