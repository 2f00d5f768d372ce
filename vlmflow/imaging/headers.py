"""What the first bytes of a file say, read by hand: its format, frame counts, whether it was cut short.

Pillow is not asked here: some of its plugins allocate the canvas, or walk a million frames, just to answer.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

# Frames are counted up to here. Counting costs a step per frame, and a file of 64 MiB can hold millions.
MAX_COUNTED_FRAMES = 10_000

# Pillow steps through the parts of a file, in Python, and keeps some: 64 MiB of empty ones would take it half a minute
# and gigabytes. A file of that size has about a thousand JPEG segments, ten thousand PNG chunks; a TIFF of 100 million
# pixels that stores each row apart has up to 100,000 strips.
MAX_PARTS = 100_000
# Entries of all directories of a TIFF together; ten thousand pages have a hundred and fifty thousand.
MAX_TIFF_ENTRIES = 1_000_000
# Each scan of a progressive JPEG goes over the whole image, and may take a dozen bytes. Encoders write about ten.
MAX_JPEG_SCANS = 500

_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)
# Types of the integers of a TIFF, as struct writes them.
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
IMAGE_BRANDS = _AVIF_BRANDS | _HEIC_BRANDS
# A mark of a JPEG; what fills, and restarts within a scan, are none.
_JPEG_MARK = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_BARE = (0x01, 0xD8)  # marks without content
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Images that are recognised in order to say why they are not decoded.
_UNSUPPORTED_MAGICS = {
    b"8BPS": "a Photoshop document",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"II\xbc\x01": "a JPEG XR image",
    b"\0\0\x01\0": "an icon",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"DDS ": "a DDS texture",
    b"%!PS": "a PostScript document",
    b"#?RADIANCE": "a Radiance image",
    b"qoif": "a QOI image",
}


def sniff(data: bytes) -> str | None:
    """Names the format of a file that can be decoded, by its content: jpeg, png, webp, gif, bmp, tiff, avif, heic."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(_PNG_MAGIC):
        return "png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(_TIFF_MAGICS):
        return "tiff"
    # Any text may start with BM: the size of the header that follows must be one that exists.
    if data.startswith(b"BM") and len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] in _BMP_HEADER_SIZES:
        return "bmp"
    brands = iso_brands(data)
    if not _AVIF_BRANDS.isdisjoint(brands):
        return "avif"
    return None if _HEIC_BRANDS.isdisjoint(brands) else "heic"


def sniff_unsupported(data: bytes) -> str | None:
    """Describes an image of a format that is not decoded, such as ``an SVG drawing``; None: not known as an image."""
    for magic, description in _UNSUPPORTED_MAGICS.items():
        if data.startswith(magic):
            return description
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<") and b"<svg" in head:
        return "an SVG drawing"
    if len(data) > 2 and data[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6") and data[2:3].isspace():
        return "a PNM image"
    return None


def iso_brands(data: bytes) -> list[bytes]:
    """The brands of an ISO base media file (ISO/IEC 14496-12), the major one first; empty for another file."""
    if len(data) < 16 or data[4:8] != b"ftyp":
        return []
    end = min(struct.unpack_from(">I", data, 0)[0], len(data), 256)
    return [data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))]


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """The width and height of a WebP file. The decoder allocates that canvas when it is opened, so look first."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and len(data) >= 25:
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def count_gif_frames(data: bytes) -> int:
    """Counts the frames that are there, whole or not, of a GIF; at most ``MAX_COUNTED_FRAMES``."""
    at = 13 + gif_color_table(data[10]) if len(data) > 10 else len(data)
    frames = 0
    while at < len(data) and frames < MAX_COUNTED_FRAMES:
        if data[at] == 0x21:  # an extension: its label, then blocks
            at = skip_gif_blocks(data, at + 2)
        elif data[at] == 0x2C and at + 9 < len(data):  # an image: ten bytes, a palette, the code size, blocks
            frames += 1
            at = skip_gif_blocks(data, at + 11 + gif_color_table(data[at + 9]))
        else:  # the trailer, or rubbish
            break
    return max(frames, 1)


def gif_color_table(flags: int) -> int:
    """Bytes of the palette that stands behind these flags of a GIF, of the whole or of a frame."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def skip_gif_blocks(data: bytes, at: int) -> int:
    """Where the blocks of a GIF end that begin here."""
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def count_tiff_pages(data: bytes) -> int:
    """Counts the directories of a TIFF or BigTIFF file; at most ``MAX_COUNTED_FRAMES``."""
    return max(sum(1 for _ in _tiff_directories(data)), 1)


def _tiff_layout(data: bytes) -> tuple[str, bool]:
    """The byte order, as :mod:`struct` writes it, and whether the file is a BigTIFF."""
    return "<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+")


def _tiff_directories(data: bytes) -> Iterator[int]:
    """Yields the offset of each directory inside the file, as their chain has them; a loop in it ends it."""
    order, big = _tiff_layout(data)
    pointer, count, entry_bytes = ("Q", "Q", 20) if big else ("I", "H", 12)
    at, seen = 8 if big else 4, set[int]()
    try:
        (offset,) = struct.unpack_from(order + pointer, data, at)
        while offset and offset not in seen and len(seen) < MAX_COUNTED_FRAMES:
            (entries,) = struct.unpack_from(order + count, data, offset)
            seen.add(offset)
            yield offset
            (offset,) = struct.unpack_from(
                order + pointer, data, offset + struct.calcsize(count) + entries * entry_bytes
            )
    except (struct.error, OverflowError):  # the chain leaves the file
        return


def count_parts(data: bytes, image_format: str) -> int:
    """Counts what Pillow steps through: segments, chunks, extensions, strips; not much beyond ``MAX_PARTS``."""
    count = {
        "jpeg": _count_jpeg_segments,
        "png": _count_png_chunks,
        "gif": _count_gif_extensions,
        "tiff": _count_strips,
    }
    return count[image_format](data) if image_format in count else 0


def _count_jpeg_segments(data: bytes) -> int:
    """Counts segments before the first scan, and the bytes that fill the space between them."""
    at, segments = 2, 0
    while segments <= MAX_PARTS:
        at = data.find(b"\xff", at)
        if at < 0 or data[at + 1 : at + 2] in (b"", b"\xda"):
            break
        segments += 1
        if data[at + 1] in (0x00, 0xFF):  # filling
            at += 1
        elif 0xD0 <= data[at + 1] <= 0xD9:  # a mark without content
            at += 2
        else:
            at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    return segments


def count_jpeg_scans(data: bytes) -> int:
    """Counts scans, those of images in the metadata included; phones append whole videos behind the image."""
    return data.count(b"\xff\xda", 0, _jpeg_end(data))


def _jpeg_end(data: bytes) -> int:
    """Where the image ends: behind the first end mark that is no part of a segment, else with the file."""
    at = 2
    for _ in range(MAX_PARTS):
        mark = _JPEG_MARK.search(data, at)
        if mark is None or mark[0][1] == 0xD9:
            return mark.end() if mark else len(data)
        at = mark.end()
        if mark[0][1] not in _JPEG_BARE:
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    return len(data)


def _count_png_chunks(data: bytes) -> int:
    return sum(1 for _ in _png_chunks(data))


def count_png_frames(data: bytes) -> int:
    """Counts the frames of an animated PNG that are there, whatever it says of their number."""
    return sum(kind == b"fcTL" for kind in _png_chunks(data))


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Yields the types of the chunks of a PNG, not many more than ``MAX_PARTS``."""
    at, chunks = len(_PNG_MAGIC), 0
    while at + 8 <= len(data) and chunks <= MAX_PARTS:
        chunks += 1
        yield data[at + 4 : at + 8]
        at += int.from_bytes(data[at : at + 4], "big") + 12


def _count_gif_extensions(data: bytes) -> int:
    """Counts extensions, and the blocks they are made of, before the first frame."""
    at, parts = 13 + gif_color_table(data[10]) if len(data) > 10 else len(data), 0
    while at < len(data) and data[at] != 0x2C and parts <= MAX_PARTS:
        if data[at] != 0x21:  # rubbish, which Pillow skips byte by byte
            at, parts = at + 1, parts + 1
            continue
        at += 2
        while at < len(data) and data[at] and parts <= MAX_PARTS:
            at, parts = at + data[at] + 1, parts + 1
        at, parts = at + 1, parts + 1
    return parts


def _count_strips(data: bytes) -> int:
    pages = _tiff_pages(data)
    return max((count for entries in pages for tag, _, count, _ in entries if tag in (273, 324)), default=0)


def count_tiff_entries(data: bytes) -> int:
    """Counts the entries that all directories of a TIFF claim, which may lie over each other."""
    order, big = _tiff_layout(data)
    return sum(struct.unpack_from(order + ("Q" if big else "H"), data, at)[0] for at in _tiff_directories(data))


def tiff_tile_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields width and height of the tiles of each page of a TIFF that has some. The decoder allocates one at once.

    Of a tag that is there several times the greatest value counts: decoders differ in which one they take.
    """
    for entries in _tiff_pages(data):
        sizes: dict[int, int] = {}
        for tag, kind, count, field in entries:
            if tag in (322, 323):
                sizes[tag] = max(sizes.get(tag, 0), _tiff_integer(data, kind, count, field))
        if len(sizes) == 2:
            yield sizes[322], sizes[323]


def _tiff_pages(data: bytes) -> Iterator[Iterator[tuple[int, int, int, bytes]]]:
    """Yields, of each directory of a TIFF, its entries: tag, type, count, and the field of the value."""
    order, big = _tiff_layout(data)
    count_format, entry_format = ("Q", "HHQ8s") if big else ("H", "HHI4s")
    for start in _tiff_directories(data):
        (entries,) = struct.unpack_from(order + count_format, data, start)
        start += struct.calcsize(order + count_format)
        size = struct.calcsize(order + entry_format)
        whole = min(entries, (len(data) - start) // size)
        yield struct.iter_unpack(order + entry_format, memoryview(data)[start : start + whole * size])


def _tiff_integer(data: bytes, kind: int, count: int, field: bytes) -> int:
    """The first value of an entry, in its field or where that points to if it does not fit; 0: it is no integer."""
    order, big = _tiff_layout(data)
    if kind not in _TIFF_INTEGERS:
        return 0
    value_format = order + _TIFF_INTEGERS[kind]
    at = 0
    if struct.calcsize(value_format) * count > len(field):
        (at,) = struct.unpack(order + ("Q" if big else "I"), field)
        field = data
    if at + struct.calcsize(value_format) > len(field):
        return 0
    return int(struct.unpack_from(value_format, field, at)[0])


def png_orientation_exif(data: bytes) -> bytes | None:
    """The eXIf chunk of a PNG, which may stand after the pixels, where Pillow sees it only once it has decoded them."""
    at = len(_PNG_MAGIC)
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        (size,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"eXIf":
            return data[at + 8 : at + 8 + size]
        at += size + 12
    return None


def exif_orientation(exif: bytes) -> int:
    """1 to 8; 1 also where the first directory has none, or not as one SHORT, the type that it must have."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", exif, 4)
    count = int.from_bytes(exif[at : at + 2], "little" if order == "<" else "big")
    entries = exif[at + 2 : at + 2 + 12 * count]
    for tag, kind, number, value in struct.iter_unpack(order + "HHIH2x", entries[: len(entries) // 12 * 12]):
        if (tag, kind, number) == (0x0112, 3, 1):
            return value if 1 <= value <= 8 else 1
    return 1


def is_cut_short(data: bytes, image_format: str) -> bool:
    """Tells whether a file that did not decode lacks its end: the mark at it, or bytes that its header promises."""
    tail = data[-64:].rstrip(b"\0")
    if image_format == "jpeg":
        return not tail.endswith(b"\xff\xd9")
    if image_format == "png":
        return b"IEND" not in data[-64:]
    if image_format == "gif":
        return not tail.endswith(b";")
    if image_format == "tiff":
        return not any(True for _ in _tiff_directories(data))
    if image_format in ("avif", "heic"):
        return _iso_boxes_end(data) > len(data)
    offset = 2 if image_format == "bmp" else 4
    promised = struct.unpack_from("<I", data, offset)[0] + (8 if image_format == "webp" else 0)
    return bool(promised > len(data))


def _iso_boxes_end(data: bytes) -> int:
    at = 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        if size < 8:  # zero: to the end of the file
            return len(data)
        at += size
    return at
