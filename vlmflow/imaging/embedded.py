"""Colour profiles in files, where Pillow passes over some: read by hand, as browsers read them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from vlmflow.imaging.profiles import profile_of_code_points

_MAX_SEGMENTS = 100_000  # files of more are refused
# A mark of a JPEG; what fills, and restarts within a scan, are none.
_JPEG_MARK = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_BARE = (b"\x01", b"\xd8")  # marks without content
_END, _START_OF_SCAN, _APP2 = b"\xd9", b"\xda", b"\xe2"
# Curves of television, for which in AVIFs browsers take that of sRGB.
_TELEVISION, _SRGB = (1, 6, 14, 15), 13


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
    """Made of the code points that stand there instead of a profile."""
    for kind, content in _properties(data):
        if kind == b"colr" and content[:4] == b"nclx" and len(content) >= 8:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            named = profile_of_code_points(primaries, _SRGB if transfer in _TELEVISION else transfer)
            return None if named is None else named.file()
    return None


def _properties(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of all the images in an AVIF, which have the same colours."""
    for kind, meta in _boxes(data):
        if kind == b"meta":
            for inner_kind, inner in _boxes(meta[4:]):
                if inner_kind == b"iprp":
                    for part_kind, part in _boxes(inner):
                        if part_kind == b"ipco":
                            yield from _boxes(part)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Types and contents of the boxes of an ISO base media file (ISO/IEC 14496-12)."""
    at = 0
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > len(data):
            return
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        yield data[at + 4 : at + 8], data[at + head : end]
        at = end


# By format; of others, and of AVIFs that have one, Pillow's is the whole.
READ_BY_HAND: dict[str, Callable[[bytes], bytes | None]] = {"jpeg": _of_jpeg, "bmp": _of_bmp, "avif": _of_avif}
