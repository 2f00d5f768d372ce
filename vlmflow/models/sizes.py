"""Batches of few different sizes, for what a device prepares for each size anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vlmflow.models.pixels import PixelNormalizer

_STEP = 32


def in_few_sizes(
    compute: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, normalize: PixelNormalizer
) -> torch.Tensor:
    """What ``compute`` makes of pixels, with rows added that nobody reads, on CUDA in half precision.

    There torch prefers cuDNN's attention on Hopper, which is the fastest, and which plans for every batch size: for
    some 0.4 s, by each thread anew. Batches are of any size, as rows drop out of them.

    Args:
        compute: keeps the rows apart.
        pixels: (N, 3, S, S) uint8 RGB.
        normalize: of the model, for its device and dtype.

    Returns:
        (N, ...).
    """
    num_rows = len(pixels)
    is_planned = torch.device(normalize.device).type == "cuda" and normalize.dtype != torch.float32
    if not is_planned or num_rows == 0 or is_watched():
        return compute(pixels)
    added = round_up(num_rows, _STEP) - num_rows
    if added == 0:
        return compute(pixels)
    return compute(torch.cat([pixels, pixels.new_zeros((added, *pixels.shape[1:]))]))[:num_rows]


def is_watched() -> bool:
    """Whether someone counts or traces this thread's operations, and is to see those alone that are asked for."""
    return _get_current_dispatch_mode() is not None


def round_up(num_rows: int, step: int) -> int:
    """To a power of two, from ``step``, which is one, on to a multiple of it: few sizes, and few rows nobody reads."""
    if num_rows <= step:
        return 1 << (num_rows - 1).bit_length()
    return -(-num_rows // step) * step
