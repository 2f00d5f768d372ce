"""Bad files: each gets its class and an understandable message, and a bomb costs nothing."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images import bad_images, encode, gif, good_images, png_bomb, scene, tiff, webp_bomb
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode, inspect
from vlmflow.imaging.headers import MAX_COUNTED_FRAMES, count_gif_frames, count_jpeg_scans, count_tiff_pages

# Pillow remarks on tags that make no sense, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMITS = ImageLimits()
REQUESTS = [PixelRequest(32, "bicubic", ("squash", "center"))]


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_file_is_refused_with_its_class(name: str) -> None:
    data, expected = bad_images()[name]
    with pytest.raises(ImageError) as caught:
        decode(data, REQUESTS, LIMITS)
    assert caught.value.error_class == expected, str(caught.value)
    assert "0x" not in str(caught.value), "an object's address differs from run to run"
    assert "/" not in str(caught.value)


# What a file cut after a quarter, half and three quarters is recorded as. A GIF's first frame may be whole.
@pytest.mark.parametrize("quarter", [1, 2, 3])
@pytest.mark.parametrize("name", good_images())
def test_a_truncated_file_is_called_truncated(name: str, quarter: int) -> None:
    data = good_images()[name]
    cut = data[: len(data) * quarter // 4]
    try:
        decode(cut, REQUESTS, LIMITS)
    except ImageError as error:
        assert error.error_class == RowErrorClass.TRUNCATED, str(error)  # noqa: PT017 (some cuts still decode)
    else:
        assert name in ("animated.gif", "animated.webp", "pages.tif"), "only later frames may be lost unseen"


@pytest.mark.parametrize("bomb", [png_bomb(), webp_bomb(), tiff(1_000_000, 1_000_000)], ids=["png", "webp", "tiff"])
@pytest.mark.parametrize("read", [inspect, lambda data, limits: decode(data, REQUESTS, limits)])
def test_a_bomb_is_refused_from_its_header(bomb: bytes, read: object) -> None:
    assert callable(read)
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(ImageError, match=r"exceed limits\.max_pixels"):
            read(bomb, LIMITS)
        assert time.thread_time() - started < 0.5  # of this thread alone: others run what they will
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_pixel_limit_is_the_jobs_own_and_not_pillows() -> None:
    image = encode(scene(0, 100, 100), "PNG")
    assert decode(image, REQUESTS, ImageLimits(max_pixels=10_000)).facts.width == 100
    with pytest.raises(ImageError, match=r"100 x 100 pixels exceed limits\.max_pixels of 9,999"):
        decode(image, REQUESTS, ImageLimits(max_pixels=9_999))
    beyond_pillows = png_bomb(15_000)
    assert inspect(beyond_pillows, ImageLimits(max_pixels=300_000_000)).width == 15_000


def test_the_byte_limit_is_checked_before_anything_is_read() -> None:
    data = encode(scene(), "PNG")
    with pytest.raises(ImageError, match=r"bytes exceed limits\.max_bytes") as caught:
        decode(data, REQUESTS, ImageLimits(max_bytes=len(data) - 1))
    assert caught.value.error_class == RowErrorClass.TOO_MANY_BYTES
    assert decode(data, REQUESTS, ImageLimits(max_bytes=len(data)))


def test_counting_frames_ends_early_for_a_file_made_of_frames() -> None:
    header, frame = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0), b",\0\0\0\0\1\0\1\0\0\2\1L\0"
    assert count_gif_frames(header + frame * 100_000) == MAX_COUNTED_FRAMES
    assert count_gif_frames(gif(30)) == 30
    # Directories that point at each other in a circle, and one that points out of the file.
    assert count_tiff_pages(tiff(4, 4, next_directory=24)) == 1
    assert count_tiff_pages(tiff(4, 4, next_directory=2**31)) == 1


def test_scans_are_counted_up_to_the_end_of_the_image() -> None:
    files = good_images()
    assert [count_jpeg_scans(files[name]) for name in ("photo.jpg", "progressive.jpg")] == [1, 10]
    noise = np.random.default_rng(0).integers(0, 256, 2 << 20, np.uint8).tobytes()
    behind = (b"\xff\xda" + noise) * 20
    assert behind.count(b"\xff\xda") > 500, "as in the video that a phone appends to a photograph"
    for name in ("photo.jpg", "progressive.jpg"):
        assert count_jpeg_scans(files[name] + behind) == count_jpeg_scans(files[name])
        assert decode(files[name] + behind, REQUESTS, LIMITS).facts.width == 96
    exif = b"\xff\xe1" + struct.pack(">H", 2 + 40_000) + b"\xff\xd9\xff\xda" * 10_000
    data = files["photo.jpg"][:2] + exif + files["photo.jpg"][2:]
    assert count_jpeg_scans(data) == 10_001, "an end mark within a segment is none"
    scan = files["progressive.jpg"][files["progressive.jpg"].rindex(b"\xff\xda") : -2]
    assert count_jpeg_scans(files["progressive.jpg"][:-2] + scan * 600 + b"\xff\xd9") == 610


def test_the_error_survives_the_way_from_a_worker() -> None:
    with pytest.raises(ImageError) as caught:
        inspect(b"", LIMITS)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.error_class) == (str(caught.value), RowErrorClass.EMPTY_FILE)


def test_threads_decode_at_the_same_time_with_equal_results() -> None:
    files = list(good_images().values()) * 2
    with ThreadPoolExecutor(4) as threads:
        facts = list(threads.map(lambda data: decode(data, REQUESTS, LIMITS).facts, files))
    assert facts[: len(facts) // 2] == facts[len(facts) // 2 :]


@settings(max_examples=400, deadline=5_000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(good_images())),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    kept=st.floats(0.1, 1),
)
def test_mutated_files_end_in_pixels_or_an_image_error(name: str, edits: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(good_images()[name])
    for position, value in edits:
        # Half of the changes hit the header, where the sizes and offsets are.
        at = int(position * (len(data) - 1)) if value % 2 else int(position * min(len(data) - 1, 120))
        data[at] = value
    _decode_or_image_error(bytes(data[: max(int(kept * len(data)), 1)]))


@settings(max_examples=150, deadline=5_000, derandomize=True)
@given(start=st.sampled_from([data[:40] for data in good_images().values()]), rest=st.binary(max_size=400))
def test_rubbish_behind_a_good_start_ends_in_an_image_error(start: bytes, rest: bytes) -> None:
    _decode_or_image_error(start + rest)


def _decode_or_image_error(data: bytes) -> None:
    try:
        image = decode(data, REQUESTS, ImageLimits(max_pixels=4_000_000))
    except ImageError:
        return  # anything else fails the test
    assert image.pixels["32_bicubic"][0][1].shape == (32, 32, 3)
