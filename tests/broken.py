"""A corpus of broken files: all that :mod:`tests.tricks` makes by hand, and mutations of good files of every format."""

from __future__ import annotations

import random
from functools import cache

from tests.images import good_images
from tests.trick import CORRUPT, DECODES, TRUNCATED, Trick
from tests.tricks import tricks
from vlmflow.errors import RowErrorClass

# What a file may end in whose bytes were changed anywhere: some decoders forgive, some headers then lie.
ANYTHING = (
    DECODES,
    CORRUPT,
    TRUNCATED,
    RowErrorClass.TOO_MANY_PIXELS,
    RowErrorClass.NOT_AN_IMAGE,
    RowErrorClass.UNSUPPORTED_FORMAT,
)
CUT = (DECODES, CORRUPT, TRUNCATED, RowErrorClass.NOT_AN_IMAGE)


@cache
def corpus() -> dict[str, Trick]:
    """Files by name, each with what it may end in. Seeded: equal in every process."""
    files = dict(tricks())
    for name, data in good_images().items():
        files |= {f"cut-{part}-{name}": (data[: len(data) * part // 4], CUT) for part in (1, 2, 3)}
        files[f"cut-last-{name}"] = (data[:-1], CUT)
        files[f"cut-head-{name}"] = (data[:24], CUT)
        dice = random.Random(name)
        for number in range(3):
            files[f"flipped-{number}-{name}"] = (_flipped(data, dice, 1 + 3 * number), ANYTHING)
        third = len(data) // 3
        files[f"zeros-{name}"] = (data[:third] + bytes(third) + data[2 * third :], ANYTHING)
        files[f"ones-{name}"] = (data[:third] + b"\xff" * third + data[2 * third :], ANYTHING)
        files[f"doubled-{name}"] = (data[:third] + data[:third] + data[third:], ANYTHING)
    return files


def _flipped(data: bytes, dice: random.Random, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[dice.randrange(4, len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)
