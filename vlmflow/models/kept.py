"""Features of a batch's images, found again by the images' pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vlmflow.models.upload import numbers

# Pixels along a side, by which images are looked up; all are compared then.
_SAMPLES = 16
_ROWS_AT_ONCE = 64  # that are compared: both are copied for it


@dataclass
class _Part:
    """What one call gave.

    Attributes:
        samples: of each row some of its bytes; empty until anything is looked for.
    """

    pixels: torch.Tensor
    features: torch.Tensor
    samples: list[bytes] = field(default_factory=list)


class KeptFeatures:
    """Computes features of images that it does not have yet. Of one thread.

    Tasks of a batch see some of its images, in some order, and some see more of them than others: an embedder is shown
    all views, of which a matcher is shown the first alone.
    """

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], *, keeps_all: bool) -> None:
        """``keeps_all``: of every call; else of the last, and where it lacks an image, all are computed anew."""
        self._compute, self._keeps_all = compute, keeps_all
        self._parts: list[_Part] = []

    def of(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, ...), which, like the pixels, nobody may write to."""
        for part in self._parts:
            if _is_same_memory(part.pixels, pixels):
                return part.features
        places = self._find(pixels)
        absent = [row for row, place in enumerate(places) if place is None]
        if len(absent) == len(places) or (absent and not self._keeps_all):
            return self._computed(pixels)
        if absent:
            first_new = self._num_kept
            self._computed(pixels[numbers(absent, pixels.device)])
            for new, row in enumerate(absent, start=first_new):
                places[row] = new
        wanted = [place for place in places if place is not None]
        features = [part.features for part in self._parts]
        every = features[0] if len(features) == 1 else torch.cat(features)
        return every if wanted == list(range(len(every))) else every[numbers(wanted, every.device)]

    @property
    def _num_kept(self) -> int:
        return sum(len(part.pixels) for part in self._parts)

    def _computed(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self._keeps_all:
            self._parts.clear()  # first: both would not have room beside each other
        features = self._compute(pixels)
        self._parts.append(_Part(pixels, features))
        return features

    def _find(self, pixels: torch.Tensor) -> list[int | None]:
        """Of each row its place among all rows kept, with the very pixels; None: it is not there."""
        places: list[int | None] = [None] * len(pixels)
        begin, looked_for = 0, None
        for part in self._parts:
            if _kind(part.pixels) == _kind(pixels):
                part.samples = part.samples or _samples(part.pixels)
                looked_for = looked_for or _samples(pixels)
                where = {sample: place for place, sample in enumerate(part.samples)}
                found = [(row, where[sample]) for row, sample in enumerate(looked_for) if sample in where]
                for (row, place), is_equal in zip(found, _are_equal(part.pixels, pixels, found), strict=True):
                    if is_equal:
                        places[row] = begin + place
            begin += len(part.pixels)
        return places


def _kind(pixels: torch.Tensor) -> tuple[object, ...]:
    return pixels.shape[1:], pixels.dtype, pixels.device


def _is_same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both are one place, which neither has left since: both are there."""
    if first is second:
        return True
    same_kind = len(first) == len(second) and _kind(first) == _kind(second) and first.stride() == second.stride()
    return same_kind and first.data_ptr() == second.data_ptr()


def _samples(pixels: torch.Tensor) -> list[bytes]:
    step = max(1, pixels.shape[-1] // _SAMPLES)
    rows = pixels[:, :, step // 2 :: step, step // 2 :: step].flatten(1).cpu().numpy()
    return [row.tobytes() for row in rows]


def _are_equal(first: torch.Tensor, second: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Of each pair of a row of the second and one of the first whether all their bytes are equal.

    Hashing both would take longer than comparing them, and prove less.
    """
    ours, theirs = _rows(first), _rows(second)
    if ours.device.type != "cpu":
        return _are_equal_on_device(ours, theirs, pairs)
    of_ours, of_theirs = ours.numpy(), theirs.numpy()
    return [np.array_equal(of_ours[place], of_theirs[row]) for row, place in pairs]


def _are_equal_on_device(ours: torch.Tensor, theirs: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """As that, waiting for the device once; on a processor the copies would cost twenty times the comparison."""
    found = [torch.ones(0, dtype=torch.bool, device=ours.device)]
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows, places = zip(*pairs[start : start + _ROWS_AT_ONCE], strict=True)
        found.append((ours[numbers(places, ours.device)] == theirs[numbers(rows, ours.device)]).all(dim=1))
    flags: list[bool] = torch.cat(found).cpu().numpy().tolist()
    return flags


def _rows(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) -> (N, S S 3), without a copy of pixels as tasks have them, which lie channels last."""
    return pixels.permute(0, 2, 3, 1).flatten(1)
