"""Views against evasion: ends of long images, what is transparent, and the frames of animations."""

from __future__ import annotations

import struct
import zlib
from importlib import import_module
from io import BytesIO
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.images import encode, png, png_chunk, scene
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode, frames
from vlmflow.imaging.decode import DecodedImage
from vlmflow.imaging.frames import choose_frames, join_times, split_views
from vlmflow.imaging.pixels import VIEWS
from vlmflow.imaging.resizing import Pixels

LIMITS = ImageLimits()
REQUEST = PixelRequest(32, "bilinear", VIEWS)


def decoded(data: bytes) -> DecodedImage:
    return decode(data, [REQUEST], LIMITS)


def views_of(data: bytes) -> dict[str, Pixels]:
    pairs = decoded(data).pixels[REQUEST.key]
    assert len(dict(pairs)) == len(pairs), "names are unique"
    assert pairs[0][0] == "squash"
    return dict(pairs)


def plain(color: str, width: int = 64, height: int = 48) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def animation(images: list[Image.Image], image_format: str) -> bytes:
    file = BytesIO()
    options = {"lossless": True} if image_format == "WEBP" else {"disposal": 2} if image_format == "PNG" else {}
    images[0].save(file, image_format, save_all=True, append_images=images[1:], duration=100, loop=0, **options)
    return file.getvalue()


def moved(data: bytes, frame: int, left: int) -> bytes:
    """A GIF, one frame of which lies elsewhere: its place stands behind the comma that begins it."""
    at = 13 + (3 << (data[10] & 7) + 1)
    while True:
        if data[at] == 0x2C and frame == 0:
            return data[: at + 1] + struct.pack("<H", left) + data[at + 3 :]
        if data[at] == 0x2C:
            frame -= 1
            at += 11 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0)
        else:
            at += 2
        while data[at]:
            at += data[at] + 1
        at += 1


def numbered(count: int, odd: int) -> list[Image.Image]:
    """Frames that hardly differ, because some formats join those that do not, and one that does."""
    images = []
    for number in range(count):
        image = plain("white")
        image.putpixel((number % 64, number // 64), (250, 250, 250))
        images.append(plain("red") if number == odd else image)
    return images


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "AVIF"])
@pytest.mark.parametrize("odd", [1, 17, 58, 59])
def test_one_frame_of_sixty_that_differs_is_shown_with_its_time(image_format: str, odd: int) -> None:
    views = views_of(animation(numbered(60, odd), image_format))
    red = [
        name
        for name, pixels in views.items()
        if name.startswith("frame-") and np.abs(pixels.mean(axis=(0, 1)) - (255, 0, 0)).max() < 12
    ]
    assert len(red) == 1
    assert float(red[0].partition("@")[2]) == pytest.approx(odd * 0.1, abs=0.011)


def test_frames_that_look_alike_are_not_shown_again() -> None:
    assert [name for name in views_of(animation(numbered(30, -1), "GIF")) if name.startswith("frame")] == []


def test_pages_of_a_tiff_are_frames() -> None:
    views = views_of(animation([plain("white"), plain("blue"), plain("red")], "TIFF"))
    assert [name for name in views if name.startswith("frame")] == ["frame-1@0.000", "frame-2@0.000"]
    assert views["frame-1@0.000"][0, 0].tolist() == [0, 0, 255]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 400), seed=st.integers(0, 1000), data=st.data())
def test_a_lone_frame_is_always_chosen(count: int, seed: int, data: st.DataObject) -> None:
    odd = data.draw(st.integers(1, count - 1))
    random = np.random.default_rng(seed)
    stack = [random.normal(100, 2, (24, 24, 3)).astype(np.float32) for _ in range(count)]
    stack[odd][4:14, 4:14] += 120  # a sixth of the frame
    chosen = choose_frames(stack)
    assert odd in chosen
    assert len(chosen) <= frames.MAX_FRAME_VIEWS
    assert chosen == sorted(set(chosen))
    assert 0 not in chosen


def test_frames_that_cannot_be_seen_are_said() -> None:
    data = animation([scene(number, 64, 48) for number in range(6)], "TIFF")
    assert decoded(data).unseen is None
    damaged = bytearray(data)
    with Image.open(BytesIO(data)) as image:
        image.seek(4)
        at = image.tag_v2[273][0]  # where its pixels begin
    place = damaged.find(at.to_bytes(4, "little"))
    damaged[place : place + 4] = (10**8).to_bytes(4, "little")
    assert decode(bytes(damaged), [PixelRequest(32, "bilinear", ("squash",))], LIMITS).unseen is None
    cut = decoded(bytes(damaged))
    assert "cannot be decoded" in (cut.unseen or "")
    assert cut.pixels[REQUEST.key][0][0] == "squash"


def test_endless_animations_are_looked_at_up_to_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = animation(numbered(40, 35), "GIF")
    module = import_module("vlmflow.imaging.decode")  # the package has a function of this name
    monkeypatch.setattr(module, "MAX_FRAMES_SEEN", 30)
    assert decoded(data).unseen == "frames after the first 30 of 40 were not looked at"
    monkeypatch.setattr(module, "MAX_FRAMES_SEEN", 1000)
    monkeypatch.setattr(module, "MAX_PIXELS_SEEN", 64 * 48 * 10)
    assert "hold too many pixels" in (decoded(data).unseen or "")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_frames_are_drawn_once_and_are_the_same_where_they_are_too_many_to_keep(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = animation([scene(number, 64, 48) for number in range(12)], format)
    module = import_module("vlmflow.imaging.decode")  # the package has a function of this name
    frames_behind, num_passes = module._frames_behind, 0

    def count(*args: object) -> object:
        nonlocal num_passes
        num_passes += 1
        return frames_behind(*args)

    monkeypatch.setattr(module, "_frames_behind", count)
    kept = decoded(data).pixels[REQUEST.key]
    assert num_passes == 1
    for num_kept in (0, 6):
        monkeypatch.setattr(module, "_MAX_PIXELS_KEPT", 64 * 48 * num_kept)
        again = decoded(data).pixels[REQUEST.key]
        assert [name for name, _ in again] == [name for name, _ in kept]
        assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(again, kept, strict=True))
    assert num_passes == 5


def test_later_pages_obey_the_limit_of_pixels() -> None:
    data = animation([plain("white"), plain("blue", 4_000, 2_000)], "TIFF")
    limits = ImageLimits(max_pixels=1_000_000)
    found = decode(data, [REQUEST], limits)
    assert "too many pixels" in (found.unseen or "")
    assert [name for name, _ in found.pixels[REQUEST.key] if name.startswith("frame")] == []


@pytest.mark.parametrize("turned", [False, True])
def test_the_far_end_of_a_panorama_has_a_tile_of_its_own(turned: bool) -> None:
    image = plain("white", 600, 100)
    image.paste("red", (520, 20, 580, 80))
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_270)
    views = views_of(encode(image, "PNG"))
    assert [name for name in views if name.startswith("tile")] == [f"tile-{number}" for number in range(1, 7)]
    red = {name: float((pixels[..., 1] < 128).mean()) for name, pixels in views.items()}
    assert red["tile-6"] == pytest.approx(0.36, abs=0.05)
    assert red["squash"] < 0.1
    assert red["center"] == 0


@pytest.mark.parametrize(("width", "num_tiles"), [(199, 0), (200, 2), (201, 3), (650, 7), (900, 8), (5000, 8)])
def test_tiles_cover_the_whole_length(width: int, num_tiles: int) -> None:
    image = Image.fromarray(np.tile(np.arange(width) * 255 // width, (100, 1)).astype(np.uint8)).convert("RGB")
    tiles = [pixels for name, pixels in views_of(encode(image, "PNG")).items() if name.startswith("tile")]
    assert len(tiles) == num_tiles
    if tiles:
        edges = [(int(tile[16, 0, 0]), int(tile[16, -1, 0])) for tile in tiles]
        assert edges[0][0] <= 8
        assert edges[-1][1] >= 246
        step = 255 * max(100, width / 8) / width / 32
        assert all(after[0] <= before[1] + 2 * step + 2 for before, after in pairwise(edges))


def test_white_on_transparent_shows_on_black() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    views = views_of(encode(image, "PNG"))
    assert (views["squash"] == 255).all(), "nothing is to be seen on white"
    assert views["black"][16, 16].tolist() == [255, 255, 255]
    assert views["black"][0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("bit_depth", "color_type"), [(2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_a_colour_that_is_transparent_shows_black_on_black(bit_depth: int, color_type: int) -> None:
    white, grey = 2**bit_depth - 1, 2**bit_depth // 4
    ground = white * 2 // 3 - (bit_depth == 16)  # of unequal bytes
    values = np.full((8, 8, 3 if color_type else 1), ground)
    values[2:6, 2:6] = grey
    transparent = png_chunk(b"tRNS", struct.pack(">H", ground) * values.shape[2])
    if bit_depth >= 8:
        data = png(values, color_type, bit_depth, chunks=transparent)
    else:
        bits = np.unpackbits(values[..., 0].astype(np.uint8)[..., None], axis=2)[..., 8 - bit_depth :]
        rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bit_depth, color_type, 0, 0, 0))
        body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        data = b"\x89PNG\r\n\x1a\n" + header + transparent + body
    views = views_of(data)
    assert list(views) == ["squash", "black"]
    corners = [(int(views[name][0, 0, 0]), int(views[name][16, 16, 0])) for name in views]
    level = round(grey * 255 / white)
    assert corners == [(255, pytest.approx(level, abs=1)), (0, pytest.approx(level, abs=1))]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_a_frame_of_white_on_transparent_shows_on_black(image_format: str) -> None:
    blank, hidden = plain("white").convert("RGBA"), Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    hidden.paste((255, 255, 255, 255), (16, 12, 48, 36))
    views = views_of(animation([blank, hidden], image_format))
    assert list(views) == ["squash", "center", "frame-1@0.100"]
    assert views["frame-1@0.100"][16, 16].tolist() == [255, 255, 255]
    assert views["frame-1@0.100"][0, 0].tolist() == [0, 0, 0]
    without = PixelRequest(32, "bilinear", ("squash", "frames"))
    assert [name for name, _ in decode(encode(hidden, "PNG"), [without], LIMITS).pixels[without.key]] == ["squash"]


def test_frames_on_two_grounds_take_no_places_from_each_other() -> None:
    colours = ["red", "green", "blue", "yellow", "cyan", "magenta", "brown", "olive", "navy"]
    images = []
    for number, colour in enumerate(colours):
        image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        image.paste(colour, (4 * number, 0, 4 * number + 24, 48))
        images.append(image)
    views = views_of(animation(images, "PNG"))
    times = [name.partition("@")[2] for name in views if name.startswith("frame-")]
    assert len(times) == 2 * frames.MAX_FRAME_VIEWS
    assert len(set(times)) == frames.MAX_FRAME_VIEWS


def test_an_animation_that_says_twice_how_long_it_is_is_not_taken_for_a_still() -> None:
    data = animation([plain("white"), plain("red")], "PNG")
    at = data.find(b"acTL") - 4
    chunk = data[at : at + 20]
    found = decoded(data[:at] + chunk + chunk + data[at + 20 :])
    assert found.facts.num_frames == 1, "as Pillow sees it; other viewers play it"
    assert found.unseen == "2 frames are there, of which 1 were looked at"
    assert decoded(data).unseen is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_what_is_opaque_has_no_second_ground(mode: str) -> None:
    image = Image.new("I;16", (64, 64), 40_000) if mode == "I;16" else scene(0, 64, 64).convert(mode)
    assert list(views_of(encode(image, "PNG"))) == ["squash"]


def test_times_travel_in_the_names_of_views() -> None:
    names, times = split_views(pa.array(["squash", "frame-2@1.250", "frame-2@1.250"]))
    assert names.to_pylist() == ["squash", "frame-2", "frame-2"]
    assert times.to_pylist() == [None, 1.25, 1.25]
    back = join_times(pa.chunked_array([names]), pa.chunked_array([times]))
    assert back.to_pylist() == ["squash", "frame-2@1.250", "frame-2@1.250"]


def test_a_frame_of_a_gif_that_reaches_over_the_others_is_shown_whole() -> None:
    views = views_of(moved(animation([plain("red"), plain("blue"), plain("green")], "GIF"), 1, left=64))
    assert {pixels.shape for pixels in views.values()} == {(32, 32, 3)}
    beside = views["frame-1@0.100"]
    assert beside[0, 0].tolist() == [255, 0, 0]
    assert beside[0, 31].tolist() == [0, 0, 255]


def test_a_frame_before_one_that_reaches_over_it_is_shown_as_large_as_it_is() -> None:
    views = views_of(moved(animation([plain("red"), plain("green"), plain("blue")], "GIF"), 2, left=64))
    assert np.unique(views["frame-1@0.100"].reshape(-1, 3), axis=0).tolist() == [[0, 128, 0]]
    assert views["frame-2@0.200"][0, 0].tolist() == [0, 128, 0]
    assert views["frame-2@0.200"][0, 31].tolist() == [0, 0, 255]


def test_a_frame_that_makes_a_gif_larger_and_transparent_is_shown_on_both_grounds() -> None:
    data = bytes.fromhex(
        "47494638396101000f008100008c47af1047f500000000000021f9040c010000002c0000000001000f0000080b0003081c48"
        "5020808301010021f9040d010002002c0000000001000f00812d2d2d9b9b9b000000000000080b0003081c48108041830101"
        "0021f9041f010001002c0000c80001000f0081ba4e5e00000000000000000008080001081c48b06040003b"
    )
    names = [name for name, _ in decoded(data).pixels[REQUEST.key] if name.startswith("frame")]
    assert names == ["frame-1@0.010", "frame-2@0.020", "frame-3@0.020"]
