"""JPEGs decoded at reduced scale against the full decode: the figures behind ``DRAFT_RATIO``.

Pictures with the spectrum of photographs (amplitude 1/f) and hard edges, quality 90, decoded at 1/2, 1/4 and 1/8 and
resized to 128 x 128; differences of 8-bit values.
"""

from __future__ import annotations

import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.images import Array, encode, scene
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.decode import DRAFT_RATIO

SIZE = 128
LIMITS = ImageLimits()


def photograph(side: int, seed: int) -> Image.Image:
    """Noise with the spectrum of photographs, correlated channels, and rectangles with hard edges."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    layers = []
    for _ in range(4):
        spectrum = (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)) / frequency
        layer = np.fft.irfft2(spectrum, s=(side, side))
        layers.append((layer - layer.mean()) / layer.std())
    pixels = np.stack([128 + 45 * (0.8 * layers[3] + 0.2 * layer) for layer in layers[:3]], axis=-1)
    for _ in range(12):
        x, y, width, height = random.integers(5, side // 4, 4)
        box = pixels[4 * y : 4 * y + height, 4 * x : 4 * x + width]
        box[:] = box * 0.4 + random.integers(0, 256, 3) * 0.6
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def squash(data: bytes) -> Array:
    request = PixelRequest(SIZE, "bicubic", ("squash",))
    return decode(data, [request], LIMITS).pixels[request.key][0][1].astype(int)


def difference(side: int, seed: int) -> Array:
    """(128, 128, 3) between our decode and a full one, of a picture that is decoded at reduced scale."""
    data = encode(photograph(side, seed), "JPEG", quality=90)
    full = np.asarray(Image.open(BytesIO(data)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    found: Array = np.abs(squash(data) - full)
    assert found.max() > 0, "this size must take the reduced decode"
    return found


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_reduced_decode_is_about_invisible(scale: int) -> None:
    found = difference(SIZE * DRAFT_RATIO * scale, seed=scale)
    assert found.mean() <= 1.0
    assert np.percentile(found, 99.9) <= 6
    assert found.max() <= 10


@pytest.mark.parametrize(("ratio", "mean", "nearly_all"), [(1, 2.4, 12), (1.5, 1.4, 7), (2, 0.86, 4), (3, 0.37, 2)])
def test_the_ratio_decides_how_large_the_difference_is(
    ratio: float, mean: float, nearly_all: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ratio``: of the decoded side to the target's; on average, and what 99.9% stay within."""
    monkeypatch.setattr(sys.modules[decode.__module__], "DRAFT_RATIO", ratio)
    found = difference(int(SIZE * ratio * 4), seed=4)
    assert found.mean() == pytest.approx(mean, rel=0.15)
    assert np.percentile(found, 99.9) == pytest.approx(nearly_all, abs=1)


def test_a_jpeg_just_below_the_ratio_is_decoded_in_full() -> None:
    data = encode(photograph(SIZE * DRAFT_RATIO * 2 - 1, seed=1), "JPEG", quality=90)
    full = np.asarray(Image.open(BytesIO(data)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert np.array_equal(squash(data), full)


def test_the_short_side_and_the_largest_request_decide_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = _record_decoded_sizes(monkeypatch)
    data = encode(scene(0, 1600, 400), "JPEG")
    small, large = PixelRequest(48, "bicubic", ("squash",)), PixelRequest(96, "bicubic", ("squash", "center"))
    decode(data, [small], LIMITS)
    decode(data, [small, large], LIMITS)
    assert decoded == [(400, 100), (800, 200)]


def test_an_image_is_decoded_once_for_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = _record_decoded_sizes(monkeypatch)
    requests = [
        PixelRequest(64, "bicubic", ("squash",)),
        PixelRequest(48, "bicubic", ("squash", "center")),
        PixelRequest(64, "bilinear", ("squash",)),
        PixelRequest(64, "bicubic", ("squash", "center")),
    ]
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        decoded.clear()
        image = decode(encode(scene(), format), requests, LIMITS)
        assert len(decoded) == 1, format
        assert {key: [view for view, _ in views] for key, views in image.pixels.items()} == {
            "64_bicubic": ["squash", "center"],
            "48_bicubic": ["squash", "center"],
            "64_bilinear": ["squash"],
        }


def _record_decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images whose pixels Pillow decodes from here on."""
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def recording_load(self: ImageFile.ImageFile) -> object:
        if self.tile:  # later calls find the pixels there
            decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recording_load)
    return decoded
