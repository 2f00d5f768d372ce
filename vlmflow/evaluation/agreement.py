"""How far the results of two runs on the same images agree: captions, decisions, scores. The gate rests on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from vlmflow.moderation.decide import DECISIONS

T = TypeVar("T")
_DECIMALS = 12


def differing(accepted: Sequence[T | None], observed: Sequence[T | None]) -> tuple[list[int], float | None]:
    """Which accepted values are not met, and the share of them that is; None: none was accepted.

    Args:
        accepted: None: nothing was accepted here, and nothing is asked.
    """
    asked = [at for at, value in enumerate(accepted) if value is not None]
    other = [at for at in asked if accepted[at] != observed[at]]
    # Divided at once: 1 - 4/5 is less than 0.2, and a limit would not be met at its edge.
    return other, (len(asked) - len(other)) / len(asked) if asked else None


def decision_flips(accepted: Sequence[str], observed: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which images are decided more laxly than was accepted, and which more strictly."""
    moves = [DECISIONS.index(new) - DECISIONS.index(old) for old, new in zip(accepted, observed, strict=True)]
    return [at for at, move in enumerate(moves) if move < 0], [at for at, move in enumerate(moves) if move > 0]


def score_shifts(
    accepted: Sequence[Mapping[str, float | None]], observed: Sequence[Mapping[str, float | None]]
) -> tuple[dict[str, float], list[tuple[str, int]]]:
    """By label the mean absolute shift of its scores over images; and what was scored and is no more.

    Args:
        accepted: by image and label; None: it was not scored, and is not asked for.

    Returns:
        Shifts by label, and (label, image) of every score that is missing.
    """
    shifts: defaultdict[str, list[float]] = defaultdict(list)
    unscored = []
    for at, (old, new) in enumerate(zip(accepted, observed, strict=True)):
        for label, score in old.items():
            now = new.get(label)
            if score is None:
                continue
            if now is None:
                unscored.append((label, at))
            else:
                shifts[label].append(abs(now - score))
    # Values have six decimals: what is beyond comes of their sums, and would pass a limit that is met at its edge.
    return {label: round(float(np.mean(values)), _DECIMALS) for label, values in sorted(shifts.items())}, unscored
