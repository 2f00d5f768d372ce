"""Which regions of an image raise a score: what it loses when they are covered.

By occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): it asks the model that scored the image and needs nothing of its
inside, so it serves every tower and every detector alike. N: images, S: side of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

_STEPS = 10  # windows along a side
_WINDOW = 0.25  # of the side
_AT_ONCE = 32
_BLURRED_SIDE = 6

Score = Callable[[torch.Tensor], NDArray[np.float32]]


def occlusion_map(pixels: NDArray[np.uint8], score: Score) -> NDArray[np.float32]:
    """How much each pixel's neighbourhood adds to a score.

    Args:
        pixels: (S, S, 3) RGB, the view that was scored.
        score: (N, 3, S, S) uint8 -> (N,).

    Returns:
        (S, S): the mean fall of the score over the windows that cover a pixel, in the score's own unit; below 0 where
        covering it raises the score.
    """
    size = len(pixels)
    window = max(1, round(size * _WINDOW))
    starts = np.unique(np.linspace(0, size - window, _STEPS).round().astype(int))
    ground = pixels.reshape(-1, 3).mean(axis=0).astype(np.uint8)  # covers without an edge of its own
    places = [(top, left) for top in starts.tolist() for left in starts.tolist()]
    whole = float(score(_tensor(pixels[None]))[0])
    total = np.zeros((size, size), np.float64)
    count = np.zeros((size, size), np.int64)
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        covered = np.repeat(pixels[None], len(some), axis=0)
        for number, (top, left) in enumerate(some):
            covered[number, top : top + window, left : left + window] = ground
        for (top, left), value in zip(some, score(_tensor(covered)).tolist(), strict=True):
            total[top : top + window, left : left + window] += whole - value
            count[top : top + window, left : left + window] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def draw(pixels: NDArray[np.uint8], heat: NDArray[np.float32], *, blurred: bool) -> Image.Image:
    """The image in grey with the regions that raise the score in red, the strongest opaque.

    Args:
        blurred: the image underneath is blurred beyond recognition.
    """
    picture = Image.fromarray(pixels).convert("L")
    if blurred:
        small = picture.resize((_BLURRED_SIDE, _BLURRED_SIDE), Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
    strength = np.clip(heat, 0, None)
    share = strength / strength.max() if strength.max() > 0 else strength
    mask = Image.fromarray((share * 200).astype(np.uint8))
    out = picture.convert("RGB")
    out.paste(Image.new("RGB", out.size, (220, 20, 30)), mask=mask)
    return out


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
