"""Colour profiles in files, where Pillow passes over some: read by hand, as browsers read them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from vlmflow.imaging.heif import properties
from vlmflow.imaging.profiles import profile_of_nclx

_MAX_SEGMENTS = 100_000  # files of more are refused
# A mark of a JPEG; what fills, and restarts within a scan, are none.
_JPEG_MARK = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_BARE = (b"\x01", b"\xd8")  # marks without content
_END, _START_OF_SCAN, _APP2 = b"\xd9", b"\xda", b"\xe2"


def _of_jpeg(data: bytes) -> bytes | None:
    """Put together of numbered pieces, of which Pillow sees those before the frame header alone.

    Of pieces with one number the first counts. None: there are none, or not all.
    """
    at, pieces, count = 2, dict[int, bytes](), 0
    for _ in range(_MAX_SEGMENTS):
        mark = _JPEG_MARK.search(data, at)
        if mark is None or mark[1] in (_END, _START_OF_SCAN):
            break
        at = mark.end()
        if mark[1] in _BARE:
            continue
        size = max(int.from_bytes(data[at : at + 2], "big"), 2)
        if mark[1] == _APP2 and size >= 16 and data[at + 2 : at + 14] == b"ICC_PROFILE\0" and len(data) >= at + 16:
            number, of = data[at + 14 : at + 16]
            count = count or of
            if of == count:
                pieces.setdefault(number, data[at + 16 : at + size])
        at += size
    if not count or any(number not in pieces for number in range(1, count + 1)):
        return None
    return b"".join(pieces[number] for number in range(1, count + 1))


def _of_bmp(data: bytes) -> bytes | None:
    if len(data) < 138 or data[14] != 124 or data[70:74] != b"DEBM":
        return None
    at, size = struct.unpack_from("<II", data, 126)
    return data[14 + at : 14 + at + size]


def _of_avif(data: bytes) -> bytes | None:
    """Made of the code points that stand there instead of a profile; all images in the file have the same colours."""
    for kind, content in properties(data):
        if kind == b"colr" and bytes(content[:4]) == b"nclx" and len(content) >= 8:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            named = profile_of_nclx(primaries, transfer)
            return None if named is None else named.file()
    return None


# By format; of others, and of AVIFs that have one, Pillow's is the whole.
READ_BY_HAND: dict[str, Callable[[bytes], bytes | None]] = {"jpeg": _of_jpeg, "bmp": _of_bmp, "avif": _of_avif}
