"""Folders of pictures for tests of the whole job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {
    ".jpg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """A coloured rectangle on a coloured ground, another for each seed."""
    random = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = random.integers(0, 256, 3)
    left, top = random.integers(0, width // 2), random.integers(0, height // 2)
    pixels[top : top + height // 3, left : left + width // 3] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


def write_pictures(folder: Path, num_images: int, *, first_seed: int = 0) -> list[Path]:
    """Writes pictures in all formats in turn, and of several shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(num_images):
        suffix, pillow_format = list(FORMATS.items())[index % len(FORMATS)]
        path = folder / f"picture {index:05d}{suffix}"
        width, height = ((96, 64), (64, 64), (48, 120))[index % 3]
        picture(first_seed + index, width, height).save(path, pillow_format)
        paths.append(path)
    return paths


def write_broken(folder: Path) -> dict[str, str]:
    """Writes files that are no good images; returns the error class that each must get, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "JPEG", quality=95)
    data = whole.read_bytes()
    whole.unlink()
    broken = {
        "empty.jpg": (b"", "empty_file"),
        "text.png": (b"this is no image at all, but text", "not_an_image"),
        "cut.jpg": (data[: len(data) // 2], "truncated"),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>", "unsupported_format"),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    return {name: error_class for name, (_, error_class) in broken.items()}
