"""TIFFs: what their tags say of tiles and of greys is taken as the decoder takes it, on every page."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from tests.images import tiff
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode, headers
from vlmflow.imaging.pixels import VIEWS

LIMITS = ImageLimits(max_pixels=1_000_000)
REQUEST = PixelRequest(8, "bilinear", VIEWS)
BYTE, SHORT, LONG, LONG8 = 1, 3, 4, 16

Entry = tuple[int, int, int, int]  # tag, type, count, value or offset


def page(side: int, data: bytes, *changes: Entry) -> tuple[list[Entry], bytes]:
    """A page of grey; changed tags stand beside each other, in the order given."""
    entries = [(256, LONG, 1, side), (257, LONG, 1, side), (258, SHORT, 1, 8), (259, SHORT, 1, 1), (262, SHORT, 1, 1)]
    entries += [(273, LONG, 1, 0), (277, SHORT, 1, 1), (278, LONG, 1, side), (279, LONG, 1, len(data))]
    changed = {tag for tag, *_ in changes}
    kept = [entry for entry in entries if entry[0] not in changed]
    return sorted([*kept, *changes], key=lambda entry: entry[0]), data


def tiff_of(pages: Sequence[tuple[list[Entry], bytes]], order: str = "<", big: bool = False) -> bytes:
    """A TIFF or BigTIFF; tags 273 and 324 of the value 0 are set to where the page's data stand."""
    pointer, count_format, entry_format = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    out = bytearray(b"II" if order == "<" else b"MM")
    out += struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42)
    link = len(out)
    out += struct.pack(order + pointer, 0)
    for entries, data in pages:
        at, directory = len(out), len(out) + len(data) + len(data) % 2
        out += data + bytes(len(data) % 2)
        struct.pack_into(order + pointer, out, link, directory)
        out += struct.pack(order + count_format, len(entries))
        for tag, kind, count, value in entries:
            value = at if tag in (273, 324) and not value else value
            field = struct.pack(order + {BYTE: "B", SHORT: "H"}.get(kind, pointer if kind == LONG8 else "I"), value)
            out += struct.pack(order + entry_format, tag, kind, count) + field.ljust(struct.calcsize(pointer), b"\0")
        link = len(out)
        out += struct.pack(order + pointer, 0)
    return bytes(out)


def tiles(*sizes: int, kind: int = LONG) -> list[Entry]:
    """Tags of a deflated tile; several sizes: the tags are there as often."""
    found = [(tag, kind, 1, size) for tag in (322, 323) for size in sizes]
    return [(259, SHORT, 1, 8), *found, (324, LONG, 1, 0), (325, LONG, 1, 100)]


SMALL, DEFLATED = page(64, bytes(64 * 64)), zlib.compress(bytes(64 * 64))


@pytest.mark.parametrize(
    "pages",
    [
        [page(64, DEFLATED, *tiles(30_000))],
        [page(64, DEFLATED, *tiles(30_000, 64))],  # libtiff takes the first
        [page(64, DEFLATED, *tiles(64, 30_000))],
        [SMALL, page(64, DEFLATED, *tiles(30_000))],
        [SMALL, SMALL, page(64, DEFLATED, *tiles(30_000, 64)), SMALL],
        # A tag of eight bytes stands elsewhere in the file: at 8, before everything else.
        [page(64, struct.pack("<Q", 30_000), *tiles(8, kind=LONG8))],
    ],
)
def test_the_tiles_of_no_page_exceed_the_limit_of_pixels(pages: Sequence[tuple[list[Entry], bytes]]) -> None:
    with pytest.raises(ImageError, match=r"30000 x 30000 pixels exceed limits\.max_pixels") as caught:
        decode(tiff_of(pages), [REQUEST], LIMITS)
    assert caught.value.error_class is RowErrorClass.TOO_MANY_PIXELS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", [SHORT, LONG])
def test_the_size_of_tiles_is_read_in_every_layout(order: str, big: bool, kind: int) -> None:
    data = tiff_of([page(64, DEFLATED, *tiles(64, kind=kind)), page(64, DEFLATED, *tiles(128, kind=kind))], order, big)
    assert list(headers.tiff_tile_sizes(data)) == [(64, 64), (128, 128)]
    if not big or order == "<":  # which Pillow does not read
        assert decode(data, [PixelRequest(8, "bilinear", ("squash",))], LIMITS).facts.num_frames == 2


def test_directories_that_lie_over_each_other_are_not_walked_for_ever() -> None:
    directory = struct.pack("<H", 60_000) + bytes(12 * 60_000)
    data = bytearray(b"II*\0\x08\0\0\0" + bytes(200) + directory + bytes(1000))
    for number in range(20):  # each begins four bytes behind the one before, and its end points to the next
        struct.pack_into("<H", data, 8 + 4 * number, 60_000)
        struct.pack_into("<I", data, 8 + 4 * number + 2 + 12 * 60_000, 8 + 4 * (number + 1))
    assert headers.count_tiff_entries(bytes(data)) > headers.MAX_TIFF_ENTRIES
    with pytest.raises(ImageError, match="entries in its directories"):
        decode(bytes(data), [REQUEST], LIMITS)
    assert headers.count_tiff_entries(tiff(4, 4)) == 9


def grey_of(bits: int, photometric: int, data: bytes, order: str = "<") -> int:
    entries = [(258, SHORT, 1, bits), (262, SHORT, 1, photometric)]
    pixels = decode(tiff_of([page(8, data, *entries)], order), [REQUEST], LIMITS).pixels[REQUEST.key][0][1]
    assert pixels.min() == pixels.max()
    return int(pixels[0, 0, 0])


@pytest.mark.parametrize(
    ("bits", "photometric", "values", "expected"),
    [
        (12, 1, b"\xff\xff\xff", 255),
        (12, 1, b"\x80\x08\x00", 128),
        (12, 1, b"\0\0\0", 0),
        (16, 1, b"\xff\xff", 255),
        (16, 0, b"\0\0", 255),  # white is zero
        (16, 0, b"\xff\xff", 0),
        (16, 0, b"\x40\x40", 191),
        (8, 0, b"\0", 255),
        (8, 1, b"\0", 0),
    ],
)
def test_greys_are_as_bright_as_the_tags_say(bits: int, photometric: int, values: bytes, expected: int) -> None:
    assert grey_of(bits, photometric, values * (64 * bits // (8 * len(values)))) == expected
    if (bits, photometric) == (16, 1):
        assert grey_of(bits, photometric, values * 64, ">") == expected


def test_floating_point_grey_may_have_its_white_at_zero_too() -> None:
    entries = [(258, SHORT, 1, 32), (262, SHORT, 1, 0), (339, SHORT, 1, 3)]
    data = np.full(64, 0.25, "<f4").tobytes()
    pixels = decode(tiff_of([page(8, data, *entries)]), [REQUEST], LIMITS).pixels[REQUEST.key][0][1]
    assert pixels[0, 0].tolist() == [191] * 3


def test_of_32_bits_without_a_sign_the_bright_half_is_bright() -> None:
    values = np.linspace(0, 2**32 - 1, 64).astype("<u4")
    for sample_format, brightest in ((1, 63), (2, 31)):  # of numbers with a sign the largest is in the middle
        entries = [(258, SHORT, 1, 32), (339, SHORT, 1, sample_format)]
        pixels = decode(tiff_of([page(8, values.tobytes(), *entries)]), [REQUEST], LIMITS).pixels[REQUEST.key][0][1]
        assert int(pixels[..., 0].argmax()) == brightest
        assert (pixels.min(), pixels.max()) == (0, 255)


def in_planes(planes: Sequence[bytes], bits: int, *changes: Entry) -> bytes:
    """A TIFF of 8 x 8 in RGB, each colour in a plane of its own, not compressed; planes beyond these follow."""
    count = len(planes)
    starts = [8 + 10 * count + sum(map(len, planes[:number])) for number in range(count)]
    sizes = [len(plane) for plane in planes]
    data = struct.pack(f"<{2 * count}I{count}H", *starts, *sizes, *[bits] * count) + b"".join(planes)
    tags = [(258, SHORT, count, 8 + 8 * count), (262, SHORT, 1, 2), (273, LONG, count, 8), (277, SHORT, 1, count)]
    return tiff_of([page(8, data, *tags, (279, LONG, count, 8 + 4 * count), (284, SHORT, 1, 2), *changes)])


@pytest.mark.parametrize(("bits", "level"), [(8, b"\xc0"), (16, b"\x00\xc0")])
@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_planes_are_read_whatever_their_bits_and_what_is_beyond_colours(bits: int, level: bytes, beyond: int) -> None:
    planes = [
        level * 64,
        bytes(len(level) * 64),
        level * 32 + bytes(len(level) * 32),
        *[bytes(len(level) * 64)] * beyond,
    ]
    unspecified = [(338, SHORT, beyond, 0)] if beyond else []
    shown = decode(in_planes(planes, bits, *unspecified), [REQUEST], LIMITS)
    pixels = dict(shown.pixels[REQUEST.key])["squash"]
    assert shown.facts.mode == "RGB"
    assert pixels[0, 0].tolist() == [192, 0, 192]
    assert pixels[-1, -1].tolist() == [192, 0, 0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "sample_format", "value"), [("f4", 3, 0.25), ("i4", 2, 16384), ("i2", 2, 16384)])
def test_compressed_greys_are_as_bright_in_either_order_of_bytes(
    order: str, kind: str, sample_format: int, value: float
) -> None:
    values = np.full(64, value, order + kind)
    tags = [(258, SHORT, 1, 8 * values.itemsize), (259, SHORT, 1, 8), (339, SHORT, 1, sample_format)]
    data = tiff_of([page(8, zlib.compress(values.tobytes()), *tags)], order)
    assert decode(data, [REQUEST], LIMITS).pixels[REQUEST.key][0][1][0, 0].tolist() == [64] * 3


def test_grey_with_its_transparency_in_a_plane_apart_is_refused() -> None:
    """Pillow shows nothing of it: all would be transparent."""
    data = in_planes([bytes(range(64)), b"\xff" * 64], 8, (338, SHORT, 1, 2))
    data = data.replace(struct.pack("<HHII", 262, SHORT, 1, 2), struct.pack("<HHII", 262, SHORT, 1, 1))  # of grey
    data = data.replace(struct.pack("<HHII", 258, SHORT, 2, 24), struct.pack("<HHI2H", 258, SHORT, 2, 8, 8))
    with pytest.raises(ImageError, match="transparency in a plane apart is not decoded") as caught:
        decode(data, [REQUEST], LIMITS)
    assert caught.value.error_class is RowErrorClass.UNSUPPORTED_FORMAT
