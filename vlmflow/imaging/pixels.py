"""Normalisation of every mode to RGB, and the views that models are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vlmflow.imaging.colours import cmyk_to_rgb, in_srgb
from vlmflow.imaging.resizing import Box, Interpolation, Pixels, Resizer

VIEWS = ("squash", "center", "tiles", "black", "frames")
# Views of the decoded image itself; the others are made of what else the file holds.
_OF_IMAGE = ("squash", "center", "tiles")

# From this ratio of its sides on, an image is long: what lies at its ends is squashed beyond recognition, and cropped
# from the centre.
_LONG = 2.0
_MAX_TILES = 8

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
_WHITE_IS_ZERO = 0

# Grey of more than 8 bits is converted in pieces of so many pixels: the floating-point copies take 50 bytes a pixel.
_GREY_BLOCK = 1 << 20


def to_rgb(image: Image.Image, ground: Literal["white", "black"] = "white") -> Image.Image:
    """Converts a decoded image of any mode to RGB; what is transparent is shown on the ground.

    16-bit grey is scaled by 255/65535, that of a TIFF of 12 bits by 255/4095. Grey of 32 bits or floating point has no
    agreed white: values within 16 bits (floats within 0 to 1) are scaled likewise, others from their least to their
    greatest. Colours are those that the file means by its profile.
    """
    image.load()  # a frame of a GIF that reaches over the others is transparent there, and tells so only then
    if _is_deep_grey(image):
        return _grey_to_rgb(image, ground)
    if image.mode == "CMYK":
        return cmyk_to_rgb(image)
    if image.has_transparency_data:
        rgba = in_srgb(image if image.mode == "RGBA" else image.convert("RGBA"), image)
        canvas = Image.new("RGB", image.size, ground)
        canvas.paste(rgba, mask=rgba)  # by its alpha
        return canvas
    return in_srgb(image if image.mode == "RGB" else image.convert("RGB"), image)


def shows_ground(image: Image.Image) -> bool:
    """Whether any pixel of a decoded image is transparent, so that it looks otherwise on another ground."""
    image.load()  # as above
    if not image.has_transparency_data:
        return False
    if _is_deep_grey(image):
        return bool((np.asarray(image) == image.info.get("transparency")).any())
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    least = rgba.getchannel("A").getextrema()[0]
    return isinstance(least, int) and least < 255


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _grey_to_rgb(image: Image.Image, ground: Literal["white", "black"]) -> Image.Image:
    """Scales integer grey of 16 or 32 bits and floating-point grey to 8 bits."""
    values = np.asarray(image)
    if _is_unsigned(image) and values.dtype == np.int32:
        values = values.view(np.uint32)
    blocks = [values.reshape(-1)[at : at + _GREY_BLOCK] for at in range(0, values.size, _GREY_BLOCK)]
    num_bits, is_inverted = _grey_of_tiff(image)
    low, high = 0.0, 1.0 if image.mode == "F" else 2.0**num_bits - 1
    least = min(float(_finite(block).min()) for block in blocks)
    greatest = max(float(_finite(block).max()) for block in blocks)
    if least < low or greatest > high:
        low, high = least, greatest if greatest > least else least + 1.0
    grey = np.concatenate(
        [np.rint((_finite(block) - low) * (255.0 / (high - low))).astype(np.uint8) for block in blocks]
    )
    grey = grey.reshape(values.shape)
    if is_inverted:
        grey = 255 - grey
    shown = in_srgb(Image.fromarray(grey), image).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shown.paste(ground, mask=Image.fromarray(values == transparent))
    return shown


def _grey_of_tiff(image: Image.Image) -> tuple[int, bool]:
    """The bits of integer grey, and whether its zero is white, neither of which Pillow's mode tells."""
    if not isinstance(image, TiffImageFile):
        return 16, False
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))
    is_inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return (12 if tuple(bits) == (12,) else 16), is_inverted


def _is_unsigned(image: Image.Image) -> bool:
    """Of 32 bits, which Pillow takes for numbers with a sign, by which the bright half would be darker than black."""
    if not isinstance(image, TiffImageFile) or tuple(image.tag_v2.get(_BITS_PER_SAMPLE, ())) != (32,):
        return False
    return tuple(image.tag_v2.get(_SAMPLE_FORMAT, (1,)))[:1] == (1,)


def _finite(values: NDArray[Any]) -> NDArray[np.floating[Any]]:
    # Single precision holds 16 bits exactly.
    dtype = np.float32 if values.dtype.itemsize <= 2 else np.float64
    finite: NDArray[np.floating[Any]] = np.nan_to_num(values.astype(dtype), posinf=0.0, neginf=0.0)
    return finite


def render(image: Resizer, size: int, interpolation: Interpolation, views: Sequence[str]) -> list[tuple[str, Pixels]]:
    """Renders views of an RGB image, each (size, size, 3) uint8.

    ``squash`` is the whole image, its aspect ratio given up, as BLIP and SigLIP preprocess. ``center`` is the centre
    crop at the shortest side, as CLIP preprocesses; a square image has none, since it would equal ``squash``. ``tiles``
    are, of an image at least twice as long as wide, squares from one end to the other, 8 at most: ``tile-1`` and so on.
    ``black`` and ``frames`` are not of this image alone, and left out.

    Raises:
        ValueError: a view is not one of :data:`VIEWS`.
    """
    rendered = []
    for view in names_of(views):
        for name, box in boxes(view, image.size, size):
            rendered.append((name, image(size, interpolation, box)))
    return rendered


def names_of(views: Sequence[str]) -> list[str]:
    """Those of the views that are of the decoded image itself.

    Raises:
        ValueError: a view is not one of :data:`VIEWS`.
    """
    for view in views:
        if view not in VIEWS:
            raise ValueError(f"view {view} is unknown; there are {', '.join(VIEWS)}")
    return [view for view in views if view in _OF_IMAGE]


def boxes(view: str, image_size: tuple[int, int], size: int) -> list[tuple[str, Box | None]]:
    """The parts of an image of (width, height) that a view shows at ``size``; None: all of it."""
    width, height = image_size
    if view == "squash":
        return [(view, None)]
    if view == "center":
        return [] if width == height else [(view, _center_box(image_size, size))]
    short, long = min(image_size), max(image_size)
    if long < _LONG * short:
        return []
    num_tiles = min(_MAX_TILES, math.ceil(long / short))
    length = max(short, long / num_tiles)
    starts = [(long - length) * number / (num_tiles - 1) for number in range(num_tiles)]
    tiles: list[Box] = [
        (start, 0, start + length, short) if width > height else (0, start, short, start + length) for start in starts
    ]
    return [(f"tile-{number}", box) for number, box in enumerate(tiles, 1)]


def _center_box(image_size: tuple[int, int], size: int) -> Box:
    """The part of the image that torchvision's ``Resize(size)`` and ``CenterCrop(size)`` show, in source pixels.

    Resizing only that part costs nothing for long images, whose whole would be resized to a giant first.
    """
    width, height = image_size
    short, long = min(width, height), max(width, height)
    resized_long = size * long // short
    start = round((resized_long - size) / 2) * long / resized_long
    end = min(start + size * long / resized_long, long)
    return (start, 0, end, height) if width > height else (0, start, width, end)
