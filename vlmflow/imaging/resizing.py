"""Parts of images resized to squares: by Pillow, or by torch where there is a hurry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeAlias

import numpy as np
import pyarrow
from numpy.typing import NDArray
from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image
Interpolation: TypeAlias = Literal["bicubic", "bilinear"]

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Resizing takes 36 bytes for each pixel along a side. Sides of 128 times the target and more are averaged down to at
# least 64 times first, so that an image of one row and 100 million columns does not take 4 GB.
REDUCING_GAP = 64.0

# Fewer pixels take Pillow a few milliseconds; of more, torch would need a copy of more than 100 MB.
_LEAST_PIXELS, _MOST_PIXELS = 1 << 18, 1 << 25
# Torch resizes whole images, in whose middle the square then lies.
_MOST_SQUARES = 2.0
_INTEGER = 1e-6

_is_hurried: ContextVar[bool] = ContextVar("is_hurried", default=False)


@contextmanager
def hurried() -> Iterator[None]:
    """Within, large images are resized with torch, in a fifth of the time that Pillow takes.

    For what a GPU waits for, and for processes that hold torch anyway: elsewhere the first large image brings it, which
    takes seconds and a quarter of a gigabyte. Few levels differ, by 2 at most; parts of long images, and giants, are
    left to Pillow.
    """
    token = _is_hurried.set(True)
    try:
        yield
    finally:
        _is_hurried.reset(token)


class Resizer:
    """Of one decoded image, in RGB, squares of several sizes."""

    def __init__(self, image: Image.Image) -> None:
        self.size = image.size  # width, height
        self._image = image
        self._levels: Pixels | None = None

    def __call__(self, size: int, interpolation: Interpolation, box: Box | None) -> Pixels:
        """(size, size, 3) uint8.

        Args:
            size: in pixels.
            interpolation: always antialiased.
            box: what is shown; None: all of the image.
        """
        image = self._image
        if _is_hurried.get() and image.mode == "RGB" and _LEAST_PIXELS <= image.width * image.height <= _MOST_PIXELS:
            left, top, right, bottom = box or (0, 0, *image.size)
            across, down = _grid(image.width, left, right, size), _grid(image.height, top, bottom, size)
            if across is not None and down is not None:
                return self._by_torch(size, interpolation, across, down)
        resized = image.resize((size, size), _RESAMPLING[interpolation], box=box, reducing_gap=REDUCING_GAP)
        return np.asarray(resized)

    def _by_torch(
        self, size: int, interpolation: Interpolation, across: tuple[int, int], down: tuple[int, int]
    ) -> Pixels:
        import torch

        if self._levels is None:
            self._levels = _levels(self._image)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
            levels = torch.from_numpy(self._levels).permute(2, 0, 1).unsqueeze(0)
        (width, left), (height, top) = across, down
        # Made after Pillow's; weights of 16 bits where Pillow's have 32.
        resized = torch.nn.functional.interpolate(levels, (height, width), mode=interpolation, antialias=True)
        shown: Pixels = resized[0, :3, top : top + size, left : left + size].permute(1, 2, 0).contiguous().numpy()
        return shown


def _levels(image: Image.Image) -> Pixels:
    """(height, width, 4) uint8 where the image lies in one piece, of which the fourth level is nothing; else 3."""
    try:
        levels: Pixels = pyarrow.array(image).values.to_numpy()
    except ValueError:
        return np.asarray(image)
    return levels.reshape(image.height, image.width, 4)


def _grid(length: int, start: float, end: float, size: int) -> tuple[int, int] | None:
    """How long a whole side becomes if a part of it becomes ``size``, and where that part begins then.

    None: not a number of pixels, or so many that Pillow, which makes the part alone, is quicker; or a side so long that
    it is averaged down first.
    """
    scale = size / (end - start)
    whole, first = length * scale, start * scale
    if whole >= _MOST_SQUARES * size or length >= 2 * REDUCING_GAP * size:
        return None
    if abs(whole - round(whole)) > _INTEGER or abs(first - round(first)) > _INTEGER:
        return None
    return round(whole), round(first)
