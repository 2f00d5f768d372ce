"""Which JPEGs a pool may decode on its device, told from their headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmflow.config import ImageLimits
from vlmflow.imaging.decode import PixelRequest
from vlmflow.imaging.opening import ImageFacts, open_image
from vlmflow.imaging.pixels import REDUCING_GAP

# Larger ones go to the processors, which decode them at reduced scale: on a device they would take too much memory.
_MAX_BYTES = 16 * 1024 * 1024
_MAX_PIXELS = 1 << 25

_BASELINE = 0xC0
_APP0, _APP14, _START_OF_SCAN = 0xE0, 0xEE, 0xDA
_SAMPLING = {(1, 1), (2, 1), (2, 2), (1, 2)}
# Of a block of 8 x 8: the shortest codes there are for "as the one before" and "nothing else".
_LEAST_BITS = 2
_YCBCR = 1  # Adobe's number of the colour transform


@dataclass(frozen=True)
class EncodedJpeg:
    """A JPEG within the limits that is not decoded yet.

    Attributes:
        facts: without the perceptual hash, which needs the pixels.
        orientation: EXIF, 1 to 8, to be applied to the pixels.
    """

    data: bytes | memoryview
    facts: ImageFacts
    orientation: int


def leave_encoded(
    data: bytes, requests: Sequence[PixelRequest], limits: ImageLimits, content_hash: str
) -> EncodedJpeg | None:
    """Checks a JPEG as :func:`vlmflow.imaging.decode` does, and leaves its pixels to a device.

    Returns:
        None: it is no JPEG, or one that processors decode more faithfully, or in less time.

    Raises:
        ImageError: the header is damaged, or exceeds the limits.
    """
    if len(data) > _MAX_BYTES or not is_plain(data):
        return None
    opened = open_image(data, limits, content_hash)
    width, height = opened.image.size
    smallest = min((request.size for request in requests), default=1)
    # Pillow averages longer ones down before it resizes them, which the device's resize does not.
    if width * height > _MAX_PIXELS or max(width, height) >= 2 * REDUCING_GAP * smallest:
        return None
    return EncodedJpeg(data, opened.facts, opened.orientation)


def is_plain(data: bytes) -> bool:
    """Whether every decoder makes the same picture of it: baseline, 8 bits, YCbCr in one scan, whole to its end.

    Others are left to Pillow: grey, CMYK and RGB ones, whose colours decoders guess differently; progressive ones,
    whose scans even nvJPEG reads on the processor; those cut short, of which nvJPEG may make half a picture, as far as
    that shows without decoding: they do not end as they should, or are shorter than any picture of their size.
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
            if not _is_plain_frame(frame) or content[:1] != b"\3" or colours != _YCBCR:
                return False
            return 8 * (len(data) - at - 2 - length) >= _LEAST_BITS * _num_blocks(frame)
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


def _num_blocks(frame: bytes) -> int:
    """Of 8 x 8 values, in all three components of a plain frame."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    across, down = frame[7] >> 4, frame[7] & 15
    return math.ceil(width / (8 * across)) * math.ceil(height / (8 * down)) * (across * down + 2)
