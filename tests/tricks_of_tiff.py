"""TIFFs made by hand to mislead a decoder: directories, strips and tiles that lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from tests.images import good_images
from tests.trick import CORRUPT, DECODES, TOO_MANY_PIXELS, TRUNCATED, Expected, Trick, patched


def directory(*entries: tuple[int, int, int, int], next_offset: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", next_offset)


def _tiff_file(
    changes: Iterable[tuple[int, int, int, int]] = (), body: bytes = bytes(64), next_offset: int = 0
) -> bytes:
    """A grey TIFF of 8 x 8 with its entries changed; the body stands at 8, the directory behind it."""
    entries = {tag: (tag, 4, 1, value) for tag, value in ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1))}
    entries |= {tag: (tag, 4, 1, value) for tag, value in ((273, 8), (278, 8), (279, len(body)))}
    entries |= {entry[0]: entry for entry in changes}
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory(*entries.values(), next_offset=next_offset)


def tiffs() -> dict[str, Trick]:
    good, deflated = good_images()["photo.tif"], zlib.compress(bytes(32 << 20), 9)
    chain = b"".join(directory((330, 4, 1, 8 + 18 * (n + 1))) for n in range(5_000))
    pages = b"".join(directory((256, 4, 1, 8), next_offset=8 + 18 * (n + 1)) for n in range(20_000))
    strips = struct.pack("<I", 8) * 200_000
    broken: Expected = (CORRUPT, TRUNCATED)
    return {
        "largest.tif": (_tiff_file([(256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1)]), (TOO_MANY_PIXELS,)),
        "no-size.tif": (_tiff_file([(256, 4, 1, 0)]), (CORRUPT,)),
        "size-is-text.tif": (_tiff_file([(256, 2, 4, 0x41414141)]), (CORRUPT,)),
        "directory-outside.tif": (patched(good, 4, b"\xff\xff\xff\x7f"), (TRUNCATED, CORRUPT)),
        "directory-0.tif": (patched(good, 4, bytes(4)), broken),
        "directory-in-header.tif": (patched(good, 4, b"\1\0\0\0"), broken),
        "next-is-itself.tif": (_tiff_file(next_offset=72), (DECODES,)),
        "next-outside.tif": (_tiff_file(next_offset=2**32 - 1), (DECODES,)),
        "pages-20000.tif": (_tiff_file(body=pages, next_offset=8), (DECODES, CORRUPT)),
        "entries-65535.tif": (b"II*\0\x08\0\0\0\xff\xff" + bytes(600), broken),
        "strip-outside.tif": (_tiff_file([(273, 4, 1, 2**31)]), broken),
        "strip-bytes.tif": (_tiff_file([(279, 4, 1, 2**32 - 1)]), (DECODES, *broken)),
        "strips-2e32.tif": (_tiff_file([(273, 4, 2**32 - 1, 8)]), broken),
        "strips-200000.tif": (_tiff_file([(273, 4, 200_000, 8), (278, 4, 1, 1)], body=strips), (DECODES, CORRUPT)),
        "rows-0.tif": (_tiff_file([(278, 4, 1, 0)]), (DECODES, *broken)),
        "deflate-bomb.tif": (_tiff_file([(259, 3, 1, 8)], body=deflated), (DECODES, CORRUPT)),
        "deflate-large.tif": (
            _tiff_file([(259, 3, 1, 8), (256, 4, 1, 60_000), (257, 4, 1, 60_000)], body=deflated),
            (TOO_MANY_PIXELS,),
        ),
        "tile-larger-than-image.tif": (
            _tiff_file(
                [(259, 3, 1, 8), (322, 4, 1, 16_384), (323, 4, 1, 16_384), (324, 4, 1, 8), (325, 4, 1, len(deflated))],
                body=deflated,
            ),
            (TOO_MANY_PIXELS, CORRUPT),
        ),
        "tile-0.tif": (
            _tiff_file([(322, 4, 1, 0), (323, 4, 1, 0), (324, 4, 1, 8), (325, 4, 1, 64)]),
            (DECODES, CORRUPT),
        ),
        "samples-65535.tif": (_tiff_file([(277, 4, 1, 65_535)]), (CORRUPT,)),
        "bits-65535.tif": (_tiff_file([(258, 3, 1, 65_535)]), (CORRUPT,)),
        "compression-99.tif": (_tiff_file([(259, 3, 1, 99)]), (CORRUPT,)),
        "lzw-of-nothing.tif": (_tiff_file([(259, 3, 1, 5)]), (CORRUPT, DECODES)),
        "fax-of-nothing.tif": (_tiff_file([(259, 3, 1, 4), (258, 3, 1, 1)]), (CORRUPT, DECODES)),
        "jpeg-of-nothing.tif": (_tiff_file([(259, 3, 1, 7)]), (CORRUPT,)),
        "old-jpeg.tif": (_tiff_file([(259, 3, 1, 6)]), (CORRUPT,)),
        "nested-directories.tif": (_tiff_file([(330, 4, 1, 8)], body=chain), (DECODES,)),
        "directory-in-itself.tif": (_tiff_file([(330, 4, 1, 72), (34665, 4, 1, 72)]), (DECODES,)),
        "no-entries.tif": (b"II*\0\x08\0\0\0\0\0\0\0\0\0", (CORRUPT,)),
        "big-cut.tif": (b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8, broken),
        "big-offset.tif": (b"II+\0\x08\0\0\0" + b"\xff" * 8, broken),
        "profile.tif": (_tiff_file([(34675, 7, 2**31, 8)]), (DECODES, CORRUPT)),
    }
