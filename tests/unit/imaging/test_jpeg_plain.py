"""Which JPEGs are left to a device: undamaged ones, with the caps, errors and facts of the ordinary path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.images import damaged_jpegs, encode, good_images, half, scene, with_orientation
from tests.unit.imaging.test_jpeg_draft import photograph
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode, hash_of, inspect
from vlmflow.imaging.jpeg import is_plain, leave_encoded

REQUESTS = [PixelRequest(32, "bicubic", ("squash", "center"))]
LIMITS = ImageLimits()
DEMO = Path(__file__).parents[3] / "vlmflow" / "starter" / "demo"


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"optimize": True}])
def test_ordinary_jpegs_are_plain(options: dict[str, int]) -> None:
    assert is_plain(encode(scene(), "JPEG", **options))


def test_turned_ones_are_plain_and_keep_their_orientation() -> None:
    data = with_orientation(scene(), 6)
    jpeg = leave_encoded(data, REQUESTS, LIMITS, hash_of(data))
    assert jpeg is not None
    assert jpeg.orientation == 6
    assert replace(jpeg.facts, phash=None) == inspect(data, LIMITS)


@pytest.mark.parametrize("name", [name for name in good_images() if name not in ("photo.jpg", "rotated.jpg")])
def test_all_else_is_left_to_processors(name: str) -> None:
    assert leave_encoded(good_images()[name], REQUESTS, LIMITS, "") is None


def test_rgb_without_a_colour_transform_is_left_to_processors() -> None:
    assert not is_plain(encode(scene(), "JPEG", keep_rgb=True))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", half("photo.jpg"), good_images()["photo.jpg"] + b"\0" * 9])
def test_what_does_not_end_with_its_end_is_left_to_processors(data: bytes) -> None:
    assert not is_plain(data)


@pytest.mark.parametrize("name", damaged_jpegs())
def test_scans_that_were_cut_or_changed_are_left_to_processors(name: str) -> None:
    data = damaged_jpegs()[name]
    assert is_plain(data), "whole by its markers"
    assert leave_encoded(data, REQUESTS, LIMITS, "") is None


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_scan_of_few_bits_is_whole_all_the_same(subsampling: int) -> None:
    blank = encode(Image.new("RGB", (801, 603)), "JPEG", optimize=True, subsampling=subsampling)
    assert leave_encoded(blank, REQUESTS, LIMITS, "") is not None
    start = blank.index(b"\xff\xda") + 14
    assert leave_encoded(blank[:start] + b"\xff\xd9", REQUESTS, LIMITS, "") is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_hashes_are_those_of_decoded_photographs_but_for_a_few_bits(orientation: int) -> None:
    sizes = [(60, 50), (130, 90), (300, 400), (400, 300), (513, 511), (1000, 700)]
    shown = [photograph(max(size), orientation + size[0]).resize(size) for size in sizes]
    found = distances([with_orientation(image, orientation, quality=90) for image in shown])
    assert max(found) <= 6
    assert np.mean(found) <= 2


def test_hashes_are_those_of_the_decoded_demo_but_for_a_few_bits() -> None:
    found = distances([path.read_bytes() for path in sorted(DEMO.glob("*.jpg"))])
    assert len(found) > 80
    assert max(found) <= 4


def distances(files: Sequence[bytes]) -> list[int]:
    """Bits in which the hashes differ from those of the ordinary path, of the files that are left encoded."""
    found = []
    for data in files:
        jpeg = leave_encoded(data, REQUESTS, LIMITS, "")
        if jpeg is not None:
            ours, theirs = jpeg.facts.phash, decode(data, REQUESTS, LIMITS).facts.phash
            assert ours is not None
            assert theirs is not None
            found.append((int(ours, 16) ^ int(theirs, 16)).bit_count())
    return found


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
