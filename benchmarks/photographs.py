"""Made-up photographs for benchmarks: the spectrum of real ones, hard edges, and about as many bytes as JPEG."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

_NUM_SCENES = 24
# Together about 520 KB at 1600 x 1200. Amplitudes of natural images fall with the frequency to a power of 0.8 to 1.5
# (Tolhurst, Tadmor and Chao 1992, Ophthalmic and Physiological Optics 12:229).
QUALITY, _SLOPE = 85, 1.2
_HEIC_QUALITY, _HEIC_TILE = 50, 512  # by the default of libheif, about as many bytes as JPEG


@cache
def scene(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, correlated channels, and rectangles with hard edges."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    layers = []
    for _ in range(4):
        spectrum = (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)) / frequency**_SLOPE
        layer = np.fft.irfft2(spectrum, s=(height, width))
        layers.append((layer - layer.mean()) / layer.std())
    pixels = np.stack([128 + 45 * (0.8 * layers[3] + 0.2 * layer) for layer in layers[:3]], axis=-1)
    for _ in range(12):
        x, y = random.integers(0, width - width // 4), random.integers(0, height - height // 4)
        box = pixels[y : y + random.integers(9, height // 4), x : x + random.integers(9, width // 4)]
        box[:] = box * 0.4 + random.integers(0, 256, 3) * 0.6
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str) -> bytes:
    """The bytes of a file; a HEIC in tiles, as phones write them."""
    sink = BytesIO()
    if image_format == "HEIC":
        import pillow_heif

        pillow_heif.from_pillow(image).save(sink, quality=_HEIC_QUALITY, tile_size=_HEIC_TILE)
        return sink.getvalue()
    image.save(sink, image_format, **({"quality": QUALITY} if image_format in ("JPEG", "WEBP") else {}))
    return sink.getvalue()


def write_jpegs(
    folder: Path,
    num_images: int,
    width: int = 1600,
    height: int = 1200,
    *,
    num_different: int | None = None,
    num_sizes: int = 1,
) -> int:
    """Writes photographs of which no two are equal, nor look alike to a model; returns the mean of their bytes.

    In a process per core: the arithmetic is Python's and Pillow's in turn.

    Args:
        num_different: the others are copies of these with another comment: files of other bytes and the same pixels.
            None: there are no others.
        num_sizes: each size is a pixel narrower and lower than the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_processes = os.cpu_count() or 1
    different = min(num_images, num_different or num_images)
    command = [
        sys.executable,
        "-m",
        "benchmarks.photographs",
        folder,
        different,
        width,
        height,
        num_sizes,
        num_processes,
    ]
    processes = [
        subprocess.Popen([*map(str, command), str(number)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        for number in range(num_processes)
    ]
    written = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"the photographs could not be written to {folder}")
    with ThreadPoolExecutor(num_processes) as threads:
        copied = list(threads.map(partial(_copy, folder, different), range(different, num_images)))
    return (sum(map(int, written)) + sum(copied)) // max(1, num_images)


def _name(number: int) -> str:
    return f"{number:07d}.jpg"


def _copy(folder: Path, num_different: int, number: int) -> int:
    """Writes a copy of the photograph that has the remainder of the number; returns its bytes."""
    data = (folder / _name(number % num_different)).read_bytes()
    at = 4 + int.from_bytes(data[4:6], "big")  # behind the header of JFIF, which comes first
    comment = str(number).encode()
    marker = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big")
    return (folder / _name(number)).write_bytes(data[:at] + marker + comment + data[at:])


def _write(
    folder: Path, num_images: int, size: tuple[int, int], num_sizes: int, num_processes: int, process: int
) -> int:
    """What one process writes: photographs that lie together when all are sorted by scene; returns their bytes."""
    by_scene = sorted(range(num_images), key=lambda number: number % _NUM_SCENES)
    share = slice(process * num_images // num_processes, (process + 1) * num_images // num_processes)
    num_bytes = 0
    for number in by_scene[share]:
        random = np.random.default_rng(1_000_000 + number)
        shift = tuple(int(random.integers(0, side)) for side in reversed(size))
        pixels = np.asarray(scene(*size, number % _NUM_SCENES))
        shown = np.roll(pixels, shift, (0, 1))[:, :, random.permutation(3)]
        less = number % num_sizes
        data = encoded(Image.fromarray(shown[: size[1] - less, : size[0] - less]), "JPEG")
        (folder / _name(number)).write_bytes(data)
        num_bytes += len(data)
    return num_bytes


if __name__ == "__main__":
    num_images, width, height, num_sizes, num_processes, process = map(int, sys.argv[2:])
    print(_write(Path(sys.argv[1]), num_images, (width, height), num_sizes, num_processes, process))
