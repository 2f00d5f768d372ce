"""Which JPEGs a pool may decode on its device: told from their headers, and by a quick look through all their bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import simplejpeg
from PIL import Image

from vlmflow.config import ImageLimits
from vlmflow.imaging.colours import changes_colours, of_small, shaper_of_small
from vlmflow.imaging.decode import PixelRequest, perceptual_hash
from vlmflow.imaging.opening import TRANSPOSE, ImageFacts, open_image
from vlmflow.imaging.resizing import REDUCING_GAP

# Larger ones go to the processors, which decode them at reduced scale: on a device they would take too much memory.
MAX_JPEG_BYTES = 16 * 1024 * 1024
_MAX_PIXELS = 1 << 25

_BASELINE = 0xC0
_APP0, _APP14, _START_OF_SCAN = 0xE0, 0xEE, 0xDA
_SAMPLING = {(1, 1), (2, 1), (2, 2), (1, 2)}
_YCBCR = 1  # Adobe's number of the colour transform
_HASHED_SIDE = 128  # twice that of what a perceptual hash is taken of, as where Pillow makes that small


@dataclass(frozen=True)
class EncodedJpeg:
    """A JPEG within the limits that is not decoded yet.

    Attributes:
        facts: the perceptual hash is that of the decoded image but for a few bits.
        orientation: EXIF, 1 to 8, to be applied to the pixels.
        shaper: of a colour profile, to be applied to the views; None: they are sRGB. See
            :class:`vlmflow.imaging.shapers.Shaper`.
    """

    data: bytes | memoryview
    facts: ImageFacts
    orientation: int
    shaper: bytes | None = None


def leave_encoded(
    data: bytes, requests: Sequence[PixelRequest], limits: ImageLimits, content_hash: str
) -> EncodedJpeg | None:
    """Checks a JPEG as :func:`vlmflow.imaging.decode` does, and leaves its pixels to a device.

    Returns:
        None: it is no JPEG, or a damaged one, or one that processors decode more faithfully, or in less time.

    Raises:
        ImageError: the header is damaged, or exceeds the limits.
    """
    if len(data) > MAX_JPEG_BYTES or not is_plain(data):
        return None
    opened = open_image(data, limits, content_hash)
    shaper = shaper_of_small(opened.image)
    if shaper is None and changes_colours(opened.image):
        return None
    width, height = opened.image.size
    smallest = min((request.size for request in requests), default=1)
    # Pillow averages longer ones down before it resizes them, which the device's resize does not.
    if width * height > _MAX_PIXELS or max(width, height) >= 2 * REDUCING_GAP * smallest:
        return None
    small = _made_small(data, "GRAY" if shaper is None else "RGB")
    if small is None:
        return None
    shown = small.transpose(TRANSPOSE[opened.orientation]) if opened.orientation in TRANSPOSE else small
    phash = perceptual_hash(shown, None if shaper is None else of_small(opened.image))
    facts = replace(opened.facts, phash=phash)
    return EncodedJpeg(data, facts, opened.orientation, None if shaper is None else shaper.to_bytes())


def _made_small(data: bytes, colorspace: Literal["GRAY", "RGB"]) -> Image.Image | None:
    """A JPEG, or its luminance, at the least scale that its hash can be taken of; None: libjpeg warns of it.

    A scan that ends too early is no error to nvJPEG: it shows what was in memory, pixels of other images. Here all the
    codes of a scan are read, those of the colours too, and of luminance little else is done: a sixth of the time of a
    decode.
    """
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace, min_height=_HASHED_SIDE, min_width=_HASHED_SIDE, strict=True)
    except (ValueError, RuntimeError, MemoryError):  # Pillow tries it then, and says what is wrong
        return None
    return Image.fromarray(pixels[:, :, 0] if colorspace == "GRAY" else pixels)


def is_plain(data: bytes) -> bool:
    """Whether by its header every decoder makes the same picture of it: baseline, 8 bits, YCbCr in one scan.

    Others are left to Pillow: grey, CMYK and RGB ones, whose colours decoders guess differently; progressive ones,
    whose scans even nvJPEG reads on the processor; those that do not end as they should.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return False
    at, frame, is_jfif, transform = 2, b"", False, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : at + 2 + length]
        if marker == 0xFF:  # a byte of filling
            at += 1
            continue
        if marker == _START_OF_SCAN:
            colours = _YCBCR if transform is None and (is_jfif or frame[6:15:3] == b"\1\2\3") else transform
            return _is_plain_frame(frame) and content[:1] == b"\3" and colours == _YCBCR
        if marker == _BASELINE:
            frame = content
        elif marker == _APP0:
            is_jfif = is_jfif or content.startswith(b"JFIF\0")
        elif marker == _APP14 and content.startswith(b"Adobe") and len(content) >= 12:
            transform = content[11]
        at += 2 + max(length, 2)
    return False


def _is_plain_frame(frame: bytes) -> bool:
    """A frame header: precision, height, width, number of components, then three bytes for each."""
    if len(frame) != 15 or frame[0] != 8 or frame[5] != 3:
        return False
    sampling = [(frame[at] >> 4, frame[at] & 15) for at in (7, 10, 13)]
    return sampling[0] in _SAMPLING and sampling[1] == sampling[2] == (1, 1)
