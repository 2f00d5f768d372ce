"""The tokens that steer a decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Where a caption begins and ends, and what follows its end in a batch."""

    begin: int
    end: int
    pad: int
