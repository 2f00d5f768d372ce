"""Made-up photographs for benchmarks: the spectrum of real ones, hard edges, and about as many bytes as JPEG."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

_NUM_SCENES = 24
_PARTS_OF_SCENE = 4  # each written by a process at a time
# Together about 520 KB at 1600 x 1200. Amplitudes of natural images fall with the frequency to a power of 0.8 to 1.5
# (Tolhurst, Tadmor and Chao 1992, Ophthalmic and Physiological Optics 12:229).
QUALITY, _SLOPE = 85, 1.2


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
    """The bytes of a file."""
    sink = BytesIO()
    image.save(sink, image_format, **({"quality": QUALITY} if image_format in ("JPEG", "WEBP") else {}))
    return sink.getvalue()


def write_jpegs(folder: Path, num_images: int, width: int = 1600, height: int = 1200) -> int:
    """Writes photographs of which no two are equal, nor look alike to a model; returns the mean of their bytes.

    In processes beside this one, which should have nothing at work yet: they are forked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stride = _NUM_SCENES * _PARTS_OF_SCENE
    numbers = [range(first, num_images, stride) for first in range(min(stride, num_images))]
    write = partial(_write_of_scene, folder, (width, height))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as processes:
        return sum(processes.map(write, numbers)) // max(1, num_images)


def _write_of_scene(folder: Path, size: tuple[int, int], numbers: range) -> int:
    """Some photographs of one scene; returns their bytes."""
    pixels = np.asarray(scene(*size, numbers[0] % _NUM_SCENES))
    num_bytes = 0
    for number in numbers:
        random = np.random.default_rng(1_000_000 + number)
        shift = tuple(int(random.integers(0, side)) for side in reversed(size))
        shown = np.roll(pixels, shift, (0, 1))[:, :, random.permutation(3)]
        data = encoded(Image.fromarray(shown), "JPEG")
        (folder / f"{number:07d}.jpg").write_bytes(data)
        num_bytes += len(data)
    return num_bytes
