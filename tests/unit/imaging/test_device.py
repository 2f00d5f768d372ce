"""Decoding on a device, run on a processor: the pixels of a full decode by Pillow to a level or two."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.images import encode, scene, with_orientation
from tests.unit.imaging.test_colours import ADOBE, P3, icc
from tests.unit.imaging.test_jpeg_draft import photograph
from vlmflow.config import ImageLimits
from vlmflow.errors import ClusterError
from vlmflow.imaging import PixelRequest, device, hash_of
from vlmflow.imaging.colours import of_small
from vlmflow.imaging.device import DeviceDecoder, DeviceImage, shaped
from vlmflow.imaging.jpeg import EncodedJpeg, leave_encoded
from vlmflow.imaging.pixels import VIEWS, render
from vlmflow.imaging.profiles import Curve, read_profile
from vlmflow.imaging.resizing import Resizer
from vlmflow.imaging.shapers import shaper_of

LIMITS = ImageLimits()
REQUESTS = [
    PixelRequest(96, "bicubic", ("squash",)),
    PixelRequest(56, "bicubic", VIEWS),
    PixelRequest(56, "bilinear", ("squash", "center")),
]


def left(data: bytes) -> EncodedJpeg:
    jpeg = leave_encoded(data, REQUESTS, LIMITS, hash_of(data))
    assert jpeg is not None
    return jpeg


def decode_here(*files: bytes, dtype: torch.dtype | None = None) -> list[DeviceImage]:
    images = DeviceDecoder(REQUESTS, "cpu", dtype)([left(data) for data in files])
    assert all(image is not None for image in images)
    return [image for image in images if image is not None]


def greatest_difference(data: bytes, image: DeviceImage) -> int:
    """From what Pillow makes of a full decode, over all views of all requests."""
    shown = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    worst = 0
    for request in REQUESTS:
        rendered = render(Resizer(shown), request.size, request.interpolation, request.views)
        assert image.views[request.key] == [name for name, _ in rendered]
        pixels = image.pixels[request.key].numpy().astype(int)
        assert pixels.shape == (len(rendered), request.size, request.size, 3)
        worst = max(worst, max(np.abs(pixels[at] - shown).max() for at, (_, shown) in enumerate(rendered)))
    return worst


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (201, 203), (60, 50), (250, 90), (90, 290)])
def test_pixels_are_those_of_a_full_decode_by_pillow(size: tuple[int, int]) -> None:
    data = encode(photograph(max(size), 3).resize(size), "JPEG", quality=90)
    (image,) = decode_here(data)
    assert greatest_difference(data, image) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(orientation: int) -> None:
    data = with_orientation(photograph(150, 1).resize((150, 90)), orientation)
    (image,) = decode_here(data)
    assert greatest_difference(data, image) <= 3  # of Pillow before 13; of that 2


@pytest.mark.parametrize("size", [(300, 200), (50, 80), (90, 290)])
def test_requests_that_share_a_product_get_what_each_gets_alone(size: tuple[int, int]) -> None:
    """Of 50 x 80 the requests want their products in different order, and so do not share all."""
    jpeg = left(encode(photograph(max(size), 3).resize(size), "JPEG", quality=90))
    (together,) = DeviceDecoder(REQUESTS, "cpu")([jpeg])
    assert together is not None
    for request in REQUESTS:
        (alone,) = DeviceDecoder([request], "cpu")([jpeg])
        assert alone is not None
        assert together.views[request.key] == alone.views[request.key]
        difference = together.pixels[request.key].int() - alone.pixels[request.key].int()
        assert difference.abs().max() <= 1  # sums in another order


def test_half_precision_moves_levels_by_two_at_most() -> None:
    data = encode(photograph(260, 5), "JPEG", quality=90)
    (image,) = decode_here(data, dtype=torch.float16)
    assert greatest_difference(data, image) <= 2


def test_images_of_different_sizes_come_out_in_order() -> None:
    files = [encode(scene(seed, 96 + 8 * (seed % 3), 64), "JPEG") for seed in range(7)]
    for data, image in zip(files, decode_here(*files), strict=True):
        assert greatest_difference(data, image) <= 2


def test_images_of_wide_gamuts_are_shown_as_little_cms_shows_them() -> None:
    """Beside others in one batch, of which some share their size, and some of these a profile."""
    profiles = [b"", icc(primaries=P3), icc(Curve(2.19921875), ADOBE), b"", icc(primaries=P3)]
    pictures = [photograph(240, seed).resize((240, 160 + 40 * (seed == 4))) for seed in range(5)]
    files = [
        encode(picture, "JPEG", quality=90, **({"icc_profile": profile} if profile else {}))
        for picture, profile in zip(pictures, profiles, strict=True)
    ]
    for data, profile, image in zip(files, profiles, decode_here(*files), strict=True):
        if not profile:
            assert greatest_difference(data, image) <= 1
            continue
        opened = Image.open(BytesIO(data))
        later = of_small(opened)
        assert later is not None
        (as_numbers,) = DeviceDecoder(REQUESTS, "cpu")([replace(left(data), shaper=None)])
        assert as_numbers is not None
        for request in REQUESTS:
            rendered = render(Resizer(opened), request.size, request.interpolation, request.views)
            assert image.views[request.key] == [name for name, _ in rendered]
            given, found = as_numbers.pixels[request.key].numpy(), image.pixels[request.key].numpy().astype(int)
            expected = [np.asarray(later(Image.fromarray(levels))).astype(int) for levels in given]
            assert np.abs(found - expected).max() <= 1
            assert np.abs(found - given).mean() > 2, "the profile counts"
            # A level of a resize becomes a few where a bright colour takes from a dark one.
            expected = [np.asarray(later(Image.fromarray(levels))).astype(int) for _, levels in rendered]
            assert np.abs(found - expected).mean() < 0.2


@pytest.mark.parametrize("profile", [icc(primaries=P3), icc(Curve(2.19921875), ADOBE)])
def test_colours_are_shaped_on_a_device_as_by_a_processor(profile: bytes) -> None:
    read = read_profile(profile)
    assert read is not None
    shaper = shaper_of(read)
    assert shaper is not None
    given = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), np.uint8)
    light, mixed = (torch.from_numpy(part) for part in shaper)
    found = shaped(torch.from_numpy(given), light, mixed).numpy()
    difference = np.abs(found.astype(int) - shaper.apply(given))
    assert difference.max() <= 1  # where halves are rounded
    assert (difference > 0).mean() < 1e-3


def test_a_damaged_file_is_refused_and_costs_no_other() -> None:
    good = left(encode(scene(), "JPEG"))
    damaged = EncodedJpeg(good.data[:200] + b"\xff\xd9", good.facts, 1)
    first, second, third = DeviceDecoder(REQUESTS, "cpu")([good, damaged, good])
    assert second is None
    assert first is not None
    assert third is not None
    assert torch.equal(first.pixels["96_bicubic"], third.pixels["96_bicubic"])


def test_a_file_of_another_size_than_its_header_said_is_refused() -> None:
    good, other = left(encode(scene(), "JPEG")), left(encode(scene(0, 50, 40), "JPEG"))
    assert DeviceDecoder(REQUESTS, "cpu")([EncodedJpeg(other.data, good.facts, 1)]) == [None]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to initialize batch decoding: 5")],
    ids=["torch", "nvjpeg"],
)
def test_where_memory_runs_out_halves_are_tried_and_remembered(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, calls, releases = DeviceDecoder(REQUESTS, "cpu"), [], []
    decode_jpeg = decoder._decode_jpeg

    def small(buffers: list[torch.Tensor], *rest: object, **options: object) -> object:
        calls.append(len(buffers))
        if len(buffers) > 2:
            raise error
        return decode_jpeg(buffers, *rest, **options)

    monkeypatch.setattr(decoder, "_decode_jpeg", small)
    monkeypatch.setattr(device, "release_memory", lambda: releases.append(len(calls)))
    files = [left(encode(scene(seed, 64, 64), "JPEG")) for seed in range(8)]
    images = decoder(files)
    assert calls == [8, 4, 2, 2, 2, 2]
    assert releases == [1, 2]
    calls.clear()
    again = decoder(files)
    assert calls == [2, 2, 2, 2]
    for image, other, file in zip(images, again, files, strict=True):
        (alone,) = DeviceDecoder(REQUESTS, "cpu")([file])
        assert image is not None
        assert other is not None
        assert alone is not None
        assert all(torch.equal(image.pixels[key], alone.pixels[key]) for key in alone.pixels)
    assert not caplog.records, "no image went to a processor"


def test_an_image_without_memory_is_left_to_processors_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("9.75 GiB asked for")

    decoder = DeviceDecoder(REQUESTS, "cpu")
    monkeypatch.setattr(decoder, "_decode_jpeg", run_out)
    for _ in range(2):
        assert decoder([left(encode(scene(), "JPEG"))]) == [None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "9.75 GiB" in caplog.text


def test_a_torchvision_that_cannot_decode_here_is_told_before_any_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    with pytest.raises(ClusterError, match="not compiled with nvJPEG") as raised:
        DeviceDecoder(REQUESTS, "cpu")
    assert "decode: cpu" in raised.value.remedy


def test_images_of_all_sizes_are_decoded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DeviceDecoder(REQUESTS, "cpu")
    calls: list[int] = []
    decode_jpeg = decoder._decode_jpeg

    def counting(buffers: list[torch.Tensor], *rest: object, **options: object) -> object:
        calls.append(len(buffers))
        return decode_jpeg(buffers, *rest, **options)

    monkeypatch.setattr(decoder, "_decode_jpeg", counting)
    files = [left(encode(scene(seed, 64 + 8 * seed, 64), "JPEG")) for seed in range(9)]
    assert None not in decoder(files)
    assert calls == [9]
    decoder._pixels_at_once = 3 * 128 * 64
    assert None not in decoder(files)
    assert sum(calls) == 18
    assert len(calls) > 3, "no more at once than memory is meant to hold"
