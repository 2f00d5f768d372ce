"""Whatever the bytes, decoding gives an image or an ImageError, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images import good_images
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError
from vlmflow.imaging import PixelRequest, decode

GOOD = sorted(good_images().items())
LIMITS = ImageLimits(max_pixels=4_000_000)

# A change: where (as a share of the file), what to put there, and how much of what stood there goes.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=12), st.integers(0, 40)), min_size=1, max_size=6
)


def check(data: bytes) -> None:
    error: ImageError | None = None
    try:
        image = decode(data, [PixelRequest(16, "bicubic", ("squash", "center"))], LIMITS)
    except ImageError as raised:
        error = raised
    if error is not None:
        assert error.error_class
        assert len(str(error)) < 200
    else:
        assert image.facts.width * image.facts.height <= LIMITS.max_pixels
        for pixels in image.pixels.values():
            assert {array.shape for _, array in pixels} == {(16, 16, 3)}


def changed(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    for at, new, dropped in changes:
        start = int(at * len(data))
        data = data[:start] + new + data[start + dropped :]
    return data


@given(st.sampled_from(GOOD), CHANGES)
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_mutations(good: tuple[str, bytes], changes: list[tuple[float, bytes, int]]) -> None:
    check(changed(good[1], changes))


@pytest.mark.slow
@given(st.sampled_from(GOOD), CHANGES)
@settings(max_examples=20_000, deadline=None, database=None)
def test_many_more_mutations(good: tuple[str, bytes], changes: list[tuple[float, bytes, int]]) -> None:
    check(changed(good[1], changes))


@given(st.sampled_from([data[:16] for _, data in GOOD]), st.binary(max_size=400))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_good_beginning_and_then_anything(head: bytes, rest: bytes) -> None:
    check(head + rest)
