"""Which JPEGs are left to a device: told from the header, with the caps and errors of the ordinary path."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, good_images, half, scene, with_orientation
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, hash_of, inspect
from vlmflow.imaging.jpeg import is_plain, leave_encoded

REQUESTS = [PixelRequest(32, "bicubic", ("squash", "center"))]
LIMITS = ImageLimits()


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"optimize": True}])
def test_ordinary_jpegs_are_plain(options: dict[str, int]) -> None:
    assert is_plain(encode(scene(), "JPEG", **options))


def test_turned_ones_are_plain_and_keep_their_orientation() -> None:
    data = with_orientation(scene(), 6)
    jpeg = leave_encoded(data, REQUESTS, LIMITS, hash_of(data))
    assert jpeg is not None
    assert jpeg.orientation == 6
    assert jpeg.facts == inspect(data, LIMITS)


@pytest.mark.parametrize("name", [name for name in good_images() if name not in ("photo.jpg", "rotated.jpg")])
def test_all_else_is_left_to_processors(name: str) -> None:
    assert leave_encoded(good_images()[name], REQUESTS, LIMITS, "") is None


def test_rgb_without_a_colour_transform_is_left_to_processors() -> None:
    assert not is_plain(encode(scene(), "JPEG", keep_rgb=True))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", half("photo.jpg"), good_images()["photo.jpg"] + b"\0" * 9])
def test_what_does_not_end_with_its_end_is_left_to_processors(data: bytes) -> None:
    assert not is_plain(data)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_scan_too_short_for_any_picture_of_its_size_is_left_to_processors(subsampling: int) -> None:
    blank = encode(Image.new("RGB", (801, 603)), "JPEG", optimize=True, subsampling=subsampling)
    assert is_plain(blank), "no picture takes fewer bytes"
    whole = encode(scene(0, 320, 240), "JPEG", subsampling=subsampling)
    start = whole.index(b"\xff\xda") + 14
    assert not is_plain(whole[:start] + b"\xff\xd9")
    assert not is_plain(whole[: start + 100] + b"\xff\xd9")


def test_any_cut_or_change_of_the_header_is_survived() -> None:
    data = bytearray(good_images()["photo.jpg"])
    random = np.random.default_rng(0)
    for _ in range(2_000):
        changed = bytearray(data[: random.integers(0, 700)]) + b"\xff\xd9"
        changed[random.integers(0, len(changed))] = random.integers(0, 256)
        try:
            leave_encoded(bytes(changed), REQUESTS, LIMITS, "")
        except ImageError:
            continue


def test_caps_hold_before_anything_is_left() -> None:
    data = encode(scene(0, 200, 100), "JPEG")
    with pytest.raises(ImageError) as caught:
        leave_encoded(data, REQUESTS, ImageLimits(max_pixels=19_999), "")
    assert caught.value.error_class is RowErrorClass.TOO_MANY_PIXELS
    with pytest.raises(ImageError) as caught:
        leave_encoded(data, REQUESTS, ImageLimits(max_bytes=len(data) - 1), "")
    assert caught.value.error_class is RowErrorClass.TOO_MANY_BYTES


def test_very_long_ones_are_left_to_processors() -> None:
    size = REQUESTS[0].size * 128
    assert leave_encoded(encode(Image.new("RGB", (size, 8)), "JPEG"), REQUESTS, LIMITS, "") is None
    assert leave_encoded(encode(Image.new("RGB", (size - 1, 8)), "JPEG"), REQUESTS, LIMITS, "") is not None
