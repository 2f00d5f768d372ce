"""Perceptual hashes tell images apart: what shows nothing has none, and clips have that of what they show first."""

from __future__ import annotations

from importlib import import_module, resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, scene
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError
from vlmflow.imaging import PixelRequest, decode, perceptual_hash
from vlmflow.imaging.jpeg import leave_encoded
from vlmflow.imaging.opening import hash_of
from vlmflow.known import read_hashes

LIMITS = ImageLimits()
REQUESTS = [PixelRequest(32, "bilinear", ("squash", "frames")), PixelRequest(32, "bilinear", ("squash",))]


def plain(color: str) -> Image.Image:
    return Image.new("RGB", (160, 120), color)


def clip(images: list[Image.Image], image_format: str) -> bytes:
    file = BytesIO()
    options = {"lossless": True} if image_format == "WEBP" else {}
    images[0].save(file, image_format, save_all=True, append_images=images[1:], **options)
    return file.getvalue()


@pytest.mark.parametrize("color", ["white", "black", "red", "beige", "#777"])
def test_a_plain_image_has_none(color: str) -> None:
    data = encode(plain(color), "JPEG")
    assert decode(data, REQUESTS[1:], LIMITS).facts.phash is None
    left = leave_encoded(data, REQUESTS[1:], LIMITS, hash_of(data))
    assert left is not None
    assert left.facts.phash is None


def test_noise_is_nothing_that_is_seen_and_faint_writing_is() -> None:
    noise = np.random.default_rng(0).normal(128, 5, (600, 800)).clip(0, 255).astype(np.uint8)
    assert perceptual_hash(Image.fromarray(noise)) is None
    sheet = Image.new("L", (800, 600), 255)
    sheet.paste(200, (380, 280, 420, 300))
    assert perceptual_hash(sheet) is not None


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_clip_has_that_of_its_first_frame_that_is_not_plain(image_format: str) -> None:
    shown, last = scene(0, 160, 120), scene(1, 160, 120)
    data = clip([plain("black"), plain("white"), shown, last], image_format)
    for requests in ([], REQUESTS[1:], REQUESTS):
        found = decode(data, requests, LIMITS).facts.phash
        assert found is not None
        assert (int(found, 16) ^ int(str(perceptual_hash(shown)), 16)).bit_count() <= 4
    assert decode(clip([plain("black"), plain("white")], image_format), REQUESTS, LIMITS).facts.phash is None


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_that_are_shown_do_not_move_it(image_format: str) -> None:
    data = clip([scene(number) for number in range(4)], image_format)
    first = decode(data, [], LIMITS).facts.phash
    assert first is not None
    assert decode(data, REQUESTS, LIMITS).facts.phash == first


@pytest.mark.parametrize("image_format", ["GIF", "TIFF"])
def test_few_frames_of_what_is_plain_are_decoded_for_it_alone(
    image_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, hashed = import_module("vlmflow.imaging.decode"), []
    hash_one = decoding.perceptual_hash
    monkeypatch.setattr(decoding, "perceptual_hash", lambda *given: (hashed.append(1), hash_one(*given))[1])
    data = clip([Image.new("RGB", (160, 120), (level, 255, 255)) for level in range(200, 240)], image_format)
    assert decode(data, REQUESTS[1:], LIMITS).facts.phash is None
    assert len(hashed) == 8
    late = clip([plain("black"), *(plain(f"#{n:02}0000") for n in range(1, 21)), scene(0, 160, 120)], image_format)
    assert decode(late, [], LIMITS).facts.phash is None
    hashed.clear()
    assert decode(late, REQUESTS, LIMITS).facts.phash is not None, "frames that are looked at count, however late"
    assert len(hashed) == 22
    (listed := tmp_path / "late.bin").write_bytes(late)
    assert len(read_hashes(listed, with_look=True)[1]) == 1
    hashed.clear()
    decode(clip([scene(number) for number in range(4)], image_format), REQUESTS, LIMITS)
    assert len(hashed) == 1


def test_a_listed_jpeg_has_the_hash_that_rows_of_its_bytes_have() -> None:
    """Pillow decodes it at a scale that goes by the request, and a hash is less faithful at a smaller one."""
    requests = [PixelRequest(size, "bicubic", ("squash", "frames")) for size in (224, 384)]
    distances, of_pools = [], 0
    for path in sorted((resources.files("vlmflow") / "starter" / "demo").iterdir(), key=str):
        if not path.name.endswith(".jpg"):
            continue
        data = path.read_bytes()
        try:
            rows = [decode(data, [request], LIMITS).facts for request in requests]
        except ImageError:
            continue
        if not 225 <= min(rows[0].width, rows[0].height) <= 700:
            continue
        with resources.as_file(path) as file:
            (_,), listed = read_hashes(file, with_look=True)
        distances += [(int(listed[0], 16) ^ int(str(row.phash), 16)).bit_count() for row in rows]
        left = leave_encoded(data, requests, LIMITS, rows[0].content_hash)
        if left is not None:  # a pool on a GPU decodes it, and its row has another hash
            assert left.facts.phash in listed
            of_pools += left.facts.phash != listed[0]
        assert len(listed) <= 2
    assert len(distances) > 100
    assert of_pools > 10
    assert max(distances) <= 2
    assert np.mean(distances) < 0.2


def test_frames_beyond_the_limits_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip([plain("black"), plain("white"), scene(0, 160, 120)], "GIF")
    monkeypatch.setattr(import_module("vlmflow.imaging.decode"), "MAX_PIXELS_SEEN", 160 * 120)
    assert decode(data, [], LIMITS).facts.phash is None
