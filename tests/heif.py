"""HEIC files for tests: those that the encoder makes, and others put together box by box from what it coded."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import pillow_heif
from PIL import Image

from vlmflow.imaging.heif import boxes, properties

SIDE = 64  # of tiles; the encoder takes none smaller


def as_heic(image: Image.Image, *others: Image.Image, **options: Any) -> bytes:
    """A file by the encoder of libheif; of several images the first is the main one."""
    file = pillow_heif.from_pillow(image)
    for other in others:
        file.add_from_pillow(other)
    buffer = BytesIO()
    file.save(buffer, **{"quality": 90, "primary_index": 0, **options})
    return buffer.getvalue()


def phone_photo(image: Image.Image) -> bytes:
    """As phones store a picture: in tiles, on its side, with the turn in a property and in EXIF data as well."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_heic(image.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes(), tile_size=SIDE)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind: bytes, content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags) + content)


def ispe(width: int, height: int) -> bytes:
    """The property that tells the size of an image."""
    return full_box(b"ispe", struct.pack(">II", width, height))


@dataclass(frozen=True)
class Item:
    """An image of a file, or a tile of one: its bytes, its properties, and the numbers of what it is made of.

    Attributes:
        belongs: how it belongs to another image, such as ``thmb``, and to which.
    """

    kind: bytes
    content: bytes
    properties: Sequence[bytes] = ()
    parts: Sequence[int] = ()
    belongs: tuple[bytes, int] | None = None


@cache
def coded(image_bytes: bytes, mode: str, width: int, height: int) -> tuple[bytes, bytes]:
    """The property ``hvcC`` and the coded bytes of a picture."""
    data = as_heic(Image.frombytes(mode, (width, height), image_bytes))
    configuration = next(box(kind, bytes(content)) for kind, content in properties(data) if kind == b"hvcC")
    return configuration, next(bytes(content) for kind, content in boxes(memoryview(data)) if kind == b"mdat")


def tile(image: Image.Image, *, size: tuple[int, int] | None = None, kind: bytes = b"hvc1") -> Item:
    """A coded picture, with the size that it is told to claim."""
    plain = image if image.mode == "L" else image.convert("RGB")
    configuration, content = coded(plain.tobytes(), plain.mode, *plain.size)
    return Item(kind, content, (configuration, ispe(*size or image.size)))


def grid(columns: int, rows: int, parts: Sequence[int], size: tuple[int, int]) -> Item:
    """An image of tiles, row by row."""
    content = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, *size)
    return Item(b"grid", content, (ispe(*size),), parts)


def same(part: int, size: tuple[int, int]) -> Item:
    """An image that is another, as it is."""
    return Item(b"iden", b"", (ispe(*size),), (part,))


def overlay(parts: Sequence[int], size: tuple[int, int]) -> Item:
    """Images laid over one another."""
    content = struct.pack(">BB4HII", 0, 1, *(65535,) * 4, *size) + struct.pack(">ii", 0, 0) * len(parts)
    return Item(b"iovl", content, (ispe(*size),), parts)


def heif(
    items: Sequence[Item],
    primary: int = 1,
    *,
    brand: bytes = b"heic",
    behind: bytes = b"",
    place: int = 1,
    other_kinds: Mapping[int, bytes] | None = None,
) -> bytes:
    """A file of items, numbered from 1.

    Args:
        behind: boxes at the end.
        other_kinds: by number, which items are listed a second time as.
        place: where what is not coded lies: 0 among what is, 1 in the box ``idat``, 2 in another item.
    """
    file_type = box(b"ftyp", brand + bytes(4) + b"mif1" + brand)
    others = other_kinds or {}
    start = len(file_type) + len(_meta(items, primary, 0, place, others)) + 8
    coded_bytes = b"".join(item.content for item in items if _lies_in(item, place) != 1)
    return file_type + _meta(items, primary, start, place, others) + box(b"mdat", coded_bytes) + behind


def _lies_in(item: Item, place: int) -> int:
    return place if item.parts else 0


def _meta(items: Sequence[Item], primary: int, start: int, place: int, other_kinds: Mapping[int, bytes]) -> bytes:
    hidden = {part for item in items if item.kind != b"tmap" for part in item.parts}  # shown by themselves, too
    kinds = [*((number, item.kind) for number, item in enumerate(items, 1)), *other_kinds.items()]
    infos = b"".join(
        full_box(b"infe", struct.pack(">HH4sx", number, 0, kind), 2, int(number in hidden)) for number, kind in kinds
    )
    references = b"".join(
        box(b"dimg", struct.pack(f">HH{len(item.parts)}H", number, len(item.parts), *item.parts))
        for number, item in enumerate(items, 1)
        if item.parts
    )
    references += b"".join(
        box(item.belongs[0], struct.pack(">HHH", number, 1, item.belongs[1]))
        for number, item in enumerate(items, 1)
        if item.belongs
    )
    known = list(dict.fromkeys(one for item in items for one in item.properties))
    uses = b"".join(
        struct.pack(">HB", number, len(item.properties)) + bytes(known.index(one) + 1 for one in item.properties)
        for number, item in enumerate(items, 1)
    )
    places, at, apart = b"", start, b""
    for number, item in enumerate(items, 1):
        lies_in = _lies_in(item, place)
        offset = len(apart) if lies_in == 1 else at
        places += struct.pack(">HHHHII", number, lies_in, 0, 1, offset, len(item.content))
        if lies_in == 1:
            apart += item.content
        else:
            at += len(item.content)
    return full_box(
        b"meta",
        full_box(b"hdlr", struct.pack(">I4s12xx", 0, b"pict"))
        + full_box(b"pitm", struct.pack(">H", primary))
        + full_box(b"iloc", b"\x44\0" + struct.pack(">H", len(items)) + places, 1)
        + full_box(b"iinf", struct.pack(">H", len(kinds)) + infos)
        + (full_box(b"iref", references) if references else b"")
        + box(b"iprp", box(b"ipco", b"".join(known)) + full_box(b"ipma", struct.pack(">I", len(items)) + uses))
        + box(b"idat", apart),
    )
