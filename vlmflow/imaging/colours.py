"""What a file says of its colours, and these colours in sRGB, as browsers show them and models know them.

A colour profile may make any picture of any numbers: where these by themselves look black, people may see an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ICCPROFILE, TiffImageFile

from vlmflow.imaging.png import PngFile
from vlmflow.imaging.profiles import Profile, read_profile
from vlmflow.imaging.shapers import Shaper, shaper_of

# Levels of 255 by which a profile may move a colour and count as sRGB: its tables and numbers are rounded.
_SAME = 2
# What little CMS and Pillow raise on profiles that make no sense.
_BAD_PROFILE = (ImageCms.PyCMSError, OSError, ValueError, TypeError, MemoryError)
_SHAPED = 1  # as much may a shaper be off, which little CMS rounds elsewhere
_MAX_KEPT = 16
_COLOURS_OF, _CONVERTER = "colours of", "converter"  # in what Pillow keeps of an image
_FAST, _EXACT = ImageCms.Flags.NONE, ImageCms.Flags.NOOPTIMIZE
_NEARLY_SAME = 8

# Of a profile that moves colours and greys by no more levels than these, as Display P3 and Adobe RGB do. Converted once
# they are small, photographs are 0.3 and 0.5 levels off on average, and take a tenth of the time.
_GENTLE, _GENTLE_GREY = 128, 10
# The most by which a level may be brighter than the one before it, where profiles of screens and cameras have 2. Of one
# that goes up and down neighbouring pixels may make a picture, which is gone once they are averaged.
_GENTLE_STEP = 3


class _Conversion(NamedTuple):
    """From the numbers of a file.

    Attributes:
        apply: converts an image, and keeps its transparency.
        is_gentle: it may as well come after a resize.
        shaper: the same, for a device; None: it is not gentle, or no arithmetic of curves and primaries.
    """

    apply: Callable[[Image.Image], Image.Image]
    is_gentle: bool = False
    shaper: Shaper | None = None


# None: numbers are shown as they are.
_Converter = _Conversion | None
# Of the profiles met last, by the digest of each: a catalog has few, and every image brings its own copy.
_kept: dict[bytes, _Converter] = {}


def changes_colours(image: Image.Image) -> bool:
    """Whether an image that has been opened is shown in other colours than its numbers have in sRGB."""
    return _converter(image) is not None


def is_scalable(image: Image.Image) -> bool:
    """Whether an opened image looks the same if it is made small first, and its colours are converted then."""
    converter = _converter(image)
    return converter is None or converter.is_gentle


def of_small(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """What may be done to an opened image after it was made small, in place of :func:`in_srgb`; None: nothing may."""
    if image.mode != "RGB" or image.has_transparency_data:
        return None
    converter = _converter(image)
    return converter.apply if converter is not None and converter.is_gentle else None


def shaper_of_small(image: Image.Image) -> Shaper | None:
    """The same as :func:`of_small` for a device, but for a level here and there."""
    converter = None if of_small(image) is None else _converter(image)
    return None if converter is None else converter.shaper


def in_srgb(image: Image.Image, of: Image.Image) -> Image.Image:
    """An image in RGB, or RGBA, in the colours that the file means.

    Args:
        image: as RGB, RGBA or, of grey, L; its numbers those of the file.
        of: as it was opened.
    """
    converter = None if of.mode == "CMYK" else _converter(of)
    return image if converter is None else converter.apply(image)


def shares_colours(image: Image.Image, of: Image.Image) -> Image.Image:
    """The image, from now on one whose numbers mean what those of the other do, which was opened."""
    image.info[_COLOURS_OF] = of
    return image


def cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """An image of inks as RGB: by its profile, without one as if inks were perfect."""
    converter = _converter(image)
    return image.convert("RGB") if converter is None else converter.apply(image)


def _converter(image: Image.Image) -> _Converter:
    image = image.info.get(_COLOURS_OF, image)
    # Kept with it, for profiles are long to read and asked for again and again; a page of a TIFF may have another one.
    said = image.mode, tuple(_profiles_in(image))
    kept: tuple[object, _Converter] | None = image.info.get(_CONVERTER)
    if kept is None or kept[0] != said:
        kept = image.info[_CONVERTER] = said, _find_converter(image)
    return kept[1]


def _find_converter(image: Image.Image) -> _Converter:
    is_grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    for found in _profiles_in(image):
        profile = read_profile(found) if isinstance(found, bytes) else found
        if profile is None:
            continue
        # The first that makes sense decides, also if it is of other numbers than these.
        fits = {b"RGB ": image.mode not in ("CMYK", "LAB"), b"GRAY": is_grey, b"CMYK": image.mode == "CMYK"}
        return _converter_of(profile) if fits.get(profile.space, False) else None
    return None


def _profiles_in(image: Image.Image) -> Iterator[bytes | Profile]:
    if isinstance(image, PngFile):
        yield from image.colour_profiles
        return
    # Pillow leaves that of the page before where a page of a TIFF has none.
    found = image.tag_v2.get(ICCPROFILE) if isinstance(image, TiffImageFile) else image.info.get("icc_profile")
    if isinstance(found, bytes):
        yield found


def _converter_of(profile: Profile) -> _Converter:
    data = profile.file()
    digest = hashlib.sha256(data).digest()
    if digest not in _kept:
        while len(_kept) >= _MAX_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[digest] = _make(profile, data)
    return _kept[digest]


def _make(profile: Profile, data: bytes) -> _Converter:
    try:
        if profile.space == b"GRAY":
            return _of_grey(data)
        if profile.space == b"CMYK":
            return _Conversion(_transform(data, "CMYK", "RGB").apply)
        return _of_rgb(profile, data)
    except _BAD_PROFILE:
        return None


def _transform(data: bytes, mode: str, to_mode: str, flags: ImageCms.Flags = _FAST) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(BytesIO(data))
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    # With the other intents little CMS would move blacks, which browsers leave where they are.
    return ImageCms.ImageCmsTransform(source, target, mode, to_mode, ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=flags)


def _of_rgb(profile: Profile, data: bytes) -> _Converter:
    has_table = profile.has_table
    given = _samples()
    shown, exact = (
        np.asarray(_transform(data, "RGB", "RGB", flags).apply(given)).astype(int) for flags in (_FAST, _EXACT)
    )
    moved = np.abs(shown - np.asarray(given)).max(axis=(0, 2))
    if not has_table and moved.max() <= _SAME:
        return None
    is_gentle = not has_table and moved.max() <= _GENTLE and moved[:256].max() <= _GENTLE_GREY
    is_gentle = is_gentle and all(_is_smooth(ramp) for ramp in shown[0, : 4 * 256].reshape(4, 256, 3))
    # The fast way counts in integers, which numbers that no screen has exceed.
    flags = _FAST if np.abs(shown - exact).max() <= _NEARLY_SAME else _EXACT
    plain, with_alpha = _transform(data, "RGB", "RGB", flags), _transform(data, "RGBA", "RGBA", flags)

    def convert(image: Image.Image) -> Image.Image:
        if image.mode == "L":
            image = image.convert("RGB")
        return (with_alpha if image.mode == "RGBA" else plain).apply(image)

    shaper = shaper_of(profile) if is_gentle else None
    if shaper is not None and np.abs(shaper.apply(np.asarray(given)).astype(int) - shown).max() > _SHAPED:
        shaper = None  # little CMS reads it otherwise
    return _Conversion(convert, is_gentle, shaper)


def _samples() -> Image.Image:
    """The levels of each primary and of grey, which without a table tell all there is, and mixtures."""
    ramp, dark = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    ramps = [np.stack((ramp, ramp, ramp), -1)]
    ramps += [np.stack(channels, -1) for channels in ((ramp, dark, dark), (dark, ramp, dark), (dark, dark, ramp))]
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    mixtures = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    return Image.fromarray(np.concatenate([*ramps, mixtures])[None])


def _is_smooth(shown: NDArray[np.int_]) -> bool:
    steps = np.diff(shown, axis=0)
    return bool(steps.min() >= 0 and steps.max() <= _GENTLE_STEP)


def _of_grey(data: bytes) -> _Converter:
    ramp = np.arange(256, dtype=np.uint8)
    shown = np.asarray(_transform(data, "L", "RGB").apply(Image.fromarray(ramp[None]))).astype(int)[0, :, 1]
    moved = np.abs(shown - ramp).max()
    if moved <= _SAME:
        return None
    levels = [int(level) for level in shown]

    def convert(image: Image.Image) -> Image.Image:
        kept = [*range(256)] if image.mode == "RGBA" else []
        return image.point(levels * (len(image.getbands()) - bool(kept)) + kept)

    return _Conversion(convert, bool(moved <= _GENTLE_GREY) and _is_smooth(shown))
