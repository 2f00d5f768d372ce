"""Frames of GIFs and animated PNGs are put together as browsers do: what they leave clear is clear."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from tests.images import Array, encode, png_chunk
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.pixels import VIEWS

SIDE = 16
REQUEST = PixelRequest(SIDE, "bicubic", VIEWS)
LIMITS = ImageLimits()
WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)
PALETTE = [BLACK, WHITE, RED, GREEN]
CLEAR = 1  # the index, or in a PNG of colours the one, that is transparent where a frame says so
KEEP, TO_CLEAR, TO_PREVIOUS = 0, 1, 2


@dataclass
class Frame:
    indices: Array
    at: tuple[int, int] = (0, 0)  # left, top
    disposal: int = KEEP
    has_clear: bool = False


def full(index: int) -> Array:
    return np.full((SIDE, SIDE), index, np.uint8)


def drawn(index: int) -> Array:
    """A square in the middle of what is clear."""
    indices = full(CLEAR)
    indices[4:12, 4:12] = index
    return indices


def gif(frames: Sequence[Frame], background: int = 0) -> bytes:
    palette = bytes(np.array(PALETTE, np.uint8).tobytes())
    data = b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0x81, background, 0) + palette
    for frame in frames:
        disposal = {KEEP: 1, TO_CLEAR: 2, TO_PREVIOUS: 3}[frame.disposal]
        data += b"\x21\xf9\4" + struct.pack("<BHB", disposal << 2 | frame.has_clear, 10, CLEAR) + b"\0"
        height, width = frame.indices.shape
        data += b"," + struct.pack("<HHHHB", *frame.at, width, height, 0) + b"\2"
        # Codes of three bits, with one that begins anew before each pixel.
        codes = "".join(f"{code:03b}"[::-1] for index in frame.indices.ravel() for code in (4, int(index))) + "101"
        packed = np.packbits([int(bit) for bit in codes], bitorder="little").tobytes()
        blocks = [packed[at : at + 255] for at in range(0, len(packed), 255)]
        data += b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    return data + b";"


def png(frames: Sequence[Frame], chunks: bytes = b"") -> bytes:
    """An animated PNG of colours, in which white is transparent if any frame says so."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)) + chunks
    if any(frame.has_clear for frame in frames):
        header += png_chunk(b"tRNS", struct.pack(">3H", *PALETTE[CLEAR]))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"acTL", struct.pack(">II", len(frames), 0))
    for number, frame in enumerate(frames):
        height, width = frame.indices.shape
        pixels = np.array(PALETTE, np.uint8)[frame.indices]
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
        places = struct.pack(">5I2H2B", 2 * number, width, height, *frame.at, 1, 10, frame.disposal, 1)
        data += png_chunk(b"fcTL", places)
        data += png_chunk(b"fdAT", struct.pack(">I", 2 * number + 1) + rows) if number else png_chunk(b"IDAT", rows)
    return data + png_chunk(b"IEND", b"")


def views_of(data: bytes) -> dict[str, Array]:
    return {name.partition("@")[0]: pixels for name, pixels in decode(data, [REQUEST], LIMITS).pixels[REQUEST.key]}


def colours(pixels: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a corner and of the middle."""
    return tuple(pixels[0, 0].tolist()), tuple(pixels[8, 8].tolist())


@pytest.mark.parametrize("make", [gif, png])
def test_what_is_drawn_on_a_cleared_place_is_seen_whatever_its_colour(make: Callable[[Sequence[Frame]], bytes]) -> None:
    """In the colour that decoders take for the background: nothing but that colour would be shown to models."""
    data = make([Frame(full(3), disposal=TO_CLEAR), Frame(drawn(0), has_clear=True)])
    assert decode(data, [REQUEST], LIMITS).unseen is None
    assert colours(views_of(data)["frame-1"]) == (WHITE, BLACK)


@pytest.mark.parametrize("make", [gif, png])
def test_a_frame_may_bring_back_what_was_before_it(make: Callable[[Sequence[Frame]], bytes]) -> None:
    frames = [Frame(full(2)), *[Frame(drawn(index)[4:12, 4:12], (4, 4), TO_PREVIOUS) for index in (0, 3)]]
    views = views_of(make([*frames, Frame(full(0)[:2, :2])]))
    assert [colours(views[name]) for name in ("frame-1", "frame-2", "frame-3")] == [
        (RED, BLACK),
        (RED, GREEN),
        (BLACK, RED),
    ]


def test_around_the_first_frame_of_a_gif_it_is_clear() -> None:
    inner = Frame(full(0)[4:12, 4:12], (4, 4))
    for frames in ([inner], [inner, Frame(full(3))]):
        views = views_of(gif(frames, background=0))  # black on black, as decoders fill the margin
        assert colours(views["squash"]) == (WHITE, BLACK)
    white = Frame(full(1)[4:12, 4:12], (4, 4))
    views = views_of(gif([white], background=1))
    assert colours(views["squash"]) == (WHITE, WHITE)
    assert colours(views["black"]) == (BLACK, WHITE)


def test_the_picture_before_an_animation_is_the_first_frame_and_no_ground_of_the_others() -> None:
    images = [Image.new("RGBA", (SIDE, SIDE), colour) for colour in ((*RED, 255), (*GREEN, 255), (0, 0, 0, 0))]
    views = views_of(
        encode(images[0], "PNG", save_all=True, append_images=images[1:], default_image=True, duration=100)
    )
    assert colours(views["squash"])[0] == RED
    assert {colours(pixels)[0] for name, pixels in views.items() if name.startswith("frame")} >= {GREEN}


def test_frames_of_a_png_are_in_the_colours_that_it_says() -> None:
    linear = png_chunk(b"gAMA", struct.pack(">I", 100_000))
    PALETTE.append((55, 55, 55))
    try:
        views = views_of(png([Frame(full(2)), Frame(full(4))], linear))
    finally:
        PALETTE.pop()
    assert colours(views["frame-1"])[0] == (128, 128, 128)


def test_a_frame_larger_than_the_limit_is_not_made_room_for() -> None:
    data = gif([Frame(full(2)), Frame(full(3)), Frame(full(0))])
    at = data.rindex(b"," + struct.pack("<HHHH", 0, 0, SIDE, SIDE))
    found = decode(
        data[:at] + b"," + struct.pack("<HHHH", 60_000, 60_000, SIDE, SIDE) + data[at + 9 :], [REQUEST], LIMITS
    )
    assert found.unseen == "frames after the first 2 of 3 hold too many pixels"
