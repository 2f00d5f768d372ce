"""What models are shown of an image is what people see of it in a browser."""

from __future__ import annotations

import base64
import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.browser import open_browser
from tests.images import Array, encode, good_images, png, png_chunk, scene, with_orientation
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.profiles import SRGB, SRGB_CURVE, Curve, profile_of

SIZE = 64
REQUEST = PixelRequest(SIZE, "bicubic", ("squash",))
DRAWN = """
const [uri, done] = arguments, image = new Image();
image.onerror = () => done(null);
image.onload = () => {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  done(canvas.toDataURL('image/png'));
};
image.src = uri;
"""


def icc(gamma: float | None = None, primaries: tuple[float, ...] = SRGB) -> bytes:
    profile = profile_of(SRGB_CURVE if gamma is None else Curve(gamma), primaries)
    assert profile is not None
    return profile.file()


def odd_transparency() -> dict[str, bytes]:
    """PNGs whose chunk of what is transparent is too short, too long, damaged, doubled or at the wrong place."""
    key, other = b"\0\x0a\0\x14\0\x1e", bytes(6)
    flat, of_palette = np.full((64, 96, 3), (10, 20, 30), np.uint8), encode(scene().quantize(16), "PNG")
    clear, at = png_chunk(b"tRNS", key), of_palette.index(b"IDAT") - 4
    chunks = {
        "whole": clear,
        "short": png_chunk(b"tRNS", key[:5]),
        "empty": png_chunk(b"tRNS", b""),
        "long": png_chunk(b"tRNS", key + b"\0"),
        "first-of-two": clear + png_chunk(b"tRNS", other),
        "second-of-two": png_chunk(b"tRNS", other) + clear,
        "behind-a-short-one": png_chunk(b"tRNS", key[:5]) + clear,
        "behind-a-damaged-one": png_chunk(b"tRNS", other)[:-1] + b"\0" + clear,
        "short-animation": png_chunk(b"acTL", b"\0\0\0\2") + clear,
    }
    found = {name: png(flat, 2, chunks=chunk) for name, chunk in chunks.items()}
    found["behind-the-pixels"] = png(flat, 2)[:-12] + clear + png(flat, 2)[-12:]
    for name, size, place in (("part", 3, at), ("more", 40, at), ("too-many", 300, at), ("before-it", 16, 33)):
        found[f"of-palette-{name}"] = of_palette[:place] + png_chunk(b"tRNS", bytes(size)) + of_palette[place:]
    return {f"transparent-{name}.png": data for name, data in found.items()}


def files() -> dict[str, bytes]:
    """Images whose pixels mean other colours than they would by themselves, and the good ones of all tests."""
    picture = scene()
    numbers, grey = np.asarray(picture), picture.convert("L")
    p3, swapped = (*SRGB[:2], 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), (*SRGB[:2], *SRGB[4:], *SRGB[2:4])
    transparent = picture.copy()
    transparent.putalpha(grey)
    found = {name: data for name, data in good_images().items() if not name.endswith((".tif", ".heic"))}
    for profile_name, profile in {
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "p3": icc(primaries=p3),
        "swapped": icc(primaries=swapped),
        "dark": icc(5.0),
        "light": icc(0.3),
        "damaged": icc(5.0)[:-8],
    }.items():
        found |= {
            f"{profile_name}.jpg": encode(picture, "JPEG", icc_profile=profile),
            f"{profile_name}-grey.jpg": encode(grey, "JPEG", icc_profile=profile),
            f"{profile_name}.png": encode(picture, "PNG", icc_profile=profile),
            f"{profile_name}-palette.png": encode(picture.quantize(64), "PNG", icc_profile=profile),
            f"{profile_name}-alpha.webp": encode(transparent, "WEBP", lossless=True, icc_profile=profile),
            f"{profile_name}.avif": encode(picture, "AVIF", icc_profile=profile),
        }
    for chunks_name, chunks in {
        "gamma-1": png_chunk(b"gAMA", struct.pack(">I", 100_000)),
        "gamma-50": png_chunk(b"gAMA", struct.pack(">I", 2_000)),
        "code-points-p3": png_chunk(b"cICP", bytes([12, 13, 0, 1])),
        "code-points-linear": png_chunk(b"cICP", bytes([1, 8, 0, 1])),
    }.items():
        found |= {
            f"{chunks_name}.png": png(numbers, 2, chunks=chunks),
            f"{chunks_name}-grey.png": png(np.asarray(grey), 0, chunks=chunks),
            f"{chunks_name}-deep.png": png(numbers.astype(np.uint16) * 257, 2, 16, chunks=chunks),
        }
    del found["damaged.avif"]  # which Chromium refuses
    low = np.full((64, 96, 3), 0x1212, np.uint16)
    low[16:48, 16:80] += 1
    found["one-of-16-bits-transparent.png"] = png(low, 2, 16, chunks=png_chunk(b"tRNS", b"\x12" * 6))
    found |= odd_transparency()
    found |= {f"turned-{turn}.jpg": with_orientation(picture, turn) for turn in range(1, 9)}
    return found


@pytest.mark.timeout(300)
def test_what_models_see_is_what_a_browser_shows() -> None:
    differing = {}
    with open_browser() as browser:
        browser.open("about:blank")
        browser.chrome.set_script_timeout(60)
        for name, data in files().items():
            uri = (
                f"data:image/{name.rpartition('.')[2].replace('jpg', 'jpeg')};base64,{base64.b64encode(data).decode()}"
            )
            drawn = browser.chrome.execute_async_script(DRAWN, uri)
            assert drawn is not None, name
            shown = Image.open(BytesIO(base64.b64decode(drawn.partition(",")[2]))).convert("RGB")
            image = decode(data, [REQUEST], ImageLimits())
            seen: Array = image.pixels[REQUEST.key][0][1].astype(int)
            expected = np.asarray(shown.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
            difference = float(np.abs(seen - expected).mean())
            if (image.facts.width, image.facts.height) != shown.size or difference > 2:
                differing[name] = (shown.size, round(difference, 1))
    assert differing == {}
