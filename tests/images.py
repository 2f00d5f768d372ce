"""Image files for tests, made from a seed: every format that is decoded, and files that must not be."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests import heif
from vlmflow.errors import RowErrorClass

Array = NDArray[Any]

WIDTH, HEIGHT = 96, 64


def scene(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth RGB picture with edges and some texture, so that lossy formats have something to lose."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    channels = [127 + 100 * np.sin(x / width * (3 + i) + seed) * np.cos(y / height * (2 + i)) for i in range(3)]
    pixels = np.stack(channels, axis=-1) + random.normal(0, 4, (height, width, 3))
    left, top = int(random.integers(0, width // 2)), int(random.integers(0, height // 2))
    pixels[top : top + height // 3, left : left + width // 3] = random.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_orientation(image: Image.Image, orientation: int, format: str = "JPEG", **options: Any) -> bytes:
    """An image file whose EXIF data say how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif.tobytes(), **options)


def png(pixels: Array, color_type: int, bit_depth: int = 8, *, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """A PNG of what Pillow cannot write: 16 bits a channel, Adam7 interlacing, other chunks before the pixels.

    Args:
        pixels: (height, width, channels), uint8 or uint16.
        color_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
    """
    height, width = pixels.shape[:2]
    samples = pixels.reshape(height, width, -1)
    steps = [(0, 0, 1, 1)]
    if interlaced:
        steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = bytearray()
    for x, y, step_x, step_y in steps:
        for row in samples[y::step_y, x::step_x]:
            if len(row):
                rows += b"\0" + row.astype(">u2" if bit_depth == 16 else "u1").tobytes()
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, int(interlaced))
    data = png_chunk(b"IDAT", zlib.compress(bytes(rows)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + chunks + data + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that claims to be side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


def tiff(width: int, height: int, *, next_directory: int = 0) -> bytes:
    """A little-endian TIFF of uncompressed grey with the dimensions that it is told to claim."""
    data = bytes(16)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", next_directory)


def webp_bomb() -> bytes:
    """A WebP file of a few bytes whose canvas is 16384 x 16384: its decoder would allocate it when opened."""
    canvas = (16_383).to_bytes(3, "little") * 2
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def gif(num_frames: int = 30) -> bytes:
    """An animated GIF."""
    frames = [scene(seed).quantize(32) for seed in range(num_frames)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40)


@cache
def damaged_jpegs() -> dict[str, bytes]:
    """JPEGs that are whole by their markers, whose scans were cut or changed; Pillow makes a picture of each."""
    whole = encode(scene(5, 320, 240), "JPEG", quality=90)
    start = whole.index(b"\xff\xda") + 14
    scan = whole[start:-2]
    middle, noise = len(scan) // 2, bytes(np.random.default_rng(0).integers(0, 255, 500).astype(np.uint8))
    changed = {f"cut-{kept}.jpg": scan[: int(kept * len(scan))] for kept in (0.02, 0.5, 0.98, 0.999)}
    changed["noise.jpg"] = scan[:middle] + noise + scan[middle + len(noise) :]
    changed["gap.jpg"] = scan[:middle] + scan[middle + len(noise) :]
    changed["longer.jpg"] = scan + noise
    return {name: whole[:start] + scan + b"\xff\xd9" for name, scan in changed.items()}


@cache
def good_images() -> dict[str, bytes]:
    """One file for each format and mode that is decoded, by name; each shows :func:`scene`."""
    image = scene()
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
    rgba = image.copy()
    rgba.putalpha(alpha)
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    pages = [image, scene(1), scene(2)]
    return {
        "photo.jpg": encode(image, "JPEG", quality=95),
        "progressive.jpg": encode(image, "JPEG", quality=95, progressive=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "rotated.jpg": with_orientation(image, 6),
        "photo.png": encode(image, "PNG"),
        "palette.png": encode(image.quantize(64), "PNG"),
        "palette-transparent.png": encode(image.quantize(64), "PNG", transparency=0),
        "alpha.png": encode(rgba, "PNG"),
        "grey-alpha.png": encode(rgba.convert("LA"), "PNG"),
        "grey16.png": encode(Image.fromarray(wide), "PNG"),
        "rgb16.png": png(np.asarray(image).astype(np.uint16) * 257, 2, 16),
        "bilevel.png": encode(image.convert("1"), "PNG"),
        "interlaced.png": png(np.asarray(image), 2, interlaced=True),
        "lossy.webp": encode(image, "WEBP", quality=90),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "animated.webp": encode(image, "WEBP", save_all=True, append_images=pages[1:]),
        "animated.gif": gif(),
        "photo.bmp": encode(image, "BMP"),
        "photo.tif": encode(image, "TIFF"),
        "pages.tif": encode(image, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw"),
        "cmyk.tif": encode(image.convert("CMYK"), "TIFF"),
        "grey16.tif": encode(Image.fromarray(wide), "TIFF"),
        "float.tif": encode(Image.fromarray(wide.astype(np.float32) / 65535), "TIFF"),
        "photo.avif": encode(image, "AVIF", quality=90),
        "photo.heic": heif.as_heic(image),
        "phone.heic": heif.phone_photo(image),
    }


@cache
def bad_images() -> dict[str, tuple[bytes, RowErrorClass]]:
    """Files that cannot be decoded, by name, each with the class that its row must record."""
    svg = (
        b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    )
    return {
        "empty.jpg": (b"", RowErrorClass.EMPTY_FILE),
        "text.jpg": (b"This is not an image.\n" * 20, RowErrorClass.NOT_AN_IMAGE),
        "text-like-bmp.bmp": (b"BM is how this text begins, and it goes on.", RowErrorClass.NOT_AN_IMAGE),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", RowErrorClass.NOT_AN_IMAGE),
        "zeros.jpg": (bytes(4096), RowErrorClass.NOT_AN_IMAGE),
        "drawing.jpg": (svg, RowErrorClass.UNSUPPORTED_FORMAT),
        "layers.jpg": (b"8BPS\0\x01" + bytes(60), RowErrorClass.UNSUPPORTED_FORMAT),
        "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60), RowErrorClass.CORRUPT),
        "not-hevc.heic": (heif.heif([heif.tile(scene(0, 64, 64), kind=b"j2k1")]), RowErrorClass.UNSUPPORTED_FORMAT),
        "bomb.png": (png_bomb(), RowErrorClass.TOO_MANY_PIXELS),
        "bomb.webp": (webp_bomb(), RowErrorClass.TOO_MANY_PIXELS),
        "bomb.tif": (tiff(1_000_000, 1_000_000), RowErrorClass.TOO_MANY_PIXELS),
        "short.tif": (tiff(4_000, 4_000), RowErrorClass.TRUNCATED),
        "no-pixels.png": (png_bomb(0), RowErrorClass.CORRUPT),
        "signature-only.png": (b"\x89PNG\r\n\x1a\n", RowErrorClass.TRUNCATED),
        "signature-only.jpg": (b"\xff\xd8\xff", RowErrorClass.TRUNCATED),
        "half.jpg": (half("photo.jpg"), RowErrorClass.TRUNCATED),
        "half.png": (half("photo.png"), RowErrorClass.TRUNCATED),
        "half.webp": (half("lossy.webp"), RowErrorClass.TRUNCATED),
        "half.heic": (half("photo.heic"), RowErrorClass.TRUNCATED),
    }


def half(name: str) -> bytes:
    """The first half of a good file."""
    data = good_images()[name]
    return data[: len(data) // 2]


def write_corpus(folder: Path) -> None:
    """Writes all good and bad files into a folder, and two names that are hard to handle."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in good_images().items():
        (folder / name).write_bytes(data)
    for name, (data, _) in bad_images().items():
        (folder / name).write_bytes(data)
    for name in ("a name with spaces.jpg", "Grüße 100% #1?.jpg"):
        (folder / name).write_bytes(encode(scene(len(name)), "JPEG"))
