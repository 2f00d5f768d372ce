"""Images decoded in a second of one core, to 384 x 384, by ours, Pillow, torchvision and OpenCV; and how far off.

Made-up photographs of 640 x 480, 1600 x 1200 and 4000 x 3000 as JPEG, PNG and WebP, and as HEIC where the extra `heif`
is installed, by which Pillow reads it too; from bytes in memory to an array of (384, 384, 3). Every library has one
thread. What counts is the processor's time, not the clock's, so that other work on the machine takes little away; all
sides take turns, and the best of their repeats counts. Ours also makes the perceptual hash; "for GPU" is what
processors decode for pools with a GPU, where torch resizes; "base" makes all that the profile `base` is shown: one of
384 x 384, two of 224 x 224. "In pool" is the code of the GPU's path on a processor, there for its error: its resize is
made for GPUs. The error is the difference of levels (of 255) from Pillow's full decode and bicubic resize: mean, and
what 99.9% of them stay within. OpenCV averages areas when it reduces, as one does there.

    python -m benchmarks.decode [--repeats 15] [--format HEIC]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import InterpolationMode, resize

from benchmarks.machine import add_results_option, save_result
from benchmarks.photographs import encoded, scene
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.device import DeviceDecoder
from vlmflow.imaging.heif import is_heic_supported
from vlmflow.imaging.jpeg import leave_encoded
from vlmflow.imaging.resizing import hurried

SIDE = 384
SIZES = ((640, 480), (1600, 1200), (4000, 3000))
FORMATS = ("JPEG", "PNG", "WEBP", *(("HEIC",) if is_heic_supported() else ()))
REQUEST = PixelRequest(SIDE, "bicubic", ("squash",))
BASE = (REQUEST, PixelRequest(224, "bicubic", ("squash", "center")))
LIMITS = ImageLimits()
_REDUCED = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))

Pixels = NDArray[np.uint8]
Decode = Callable[[bytes], Pixels]


def ours(requests: Sequence[PixelRequest], data: bytes) -> Pixels:
    return decode(data, requests, LIMITS, "known").pixels[REQUEST.key][0][1]


def ours_for_gpu(requests: Sequence[PixelRequest], data: bytes) -> Pixels:
    with hurried():
        return ours(requests, data)


def ours_in_pool(decoder: DeviceDecoder, data: bytes) -> Pixels:
    jpeg = leave_encoded(data, [REQUEST], LIMITS, "known")
    assert jpeg is not None
    (image,) = decoder([jpeg])
    assert image is not None
    return image.pixels[REQUEST.key][0].numpy()


def pillow_full(data: bytes) -> Pixels:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pillow_draft(data: bytes) -> Pixels:
    image = Image.open(BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def torchvision(data: bytes) -> Pixels:
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return resize(image, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()


def opencv(data: bytes, flag: int = cv2.IMREAD_COLOR) -> Pixels:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    assert image is not None
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2RGB).astype(np.uint8)


def opencv_reduced(size: tuple[int, int], data: bytes) -> Pixels:
    """At the strongest reduction that keeps both sides at or above the target."""
    return opencv(data, next((flag for factor, flag in _REDUCED if min(size) // factor >= SIDE), cv2.IMREAD_COLOR))


def sides(image_format: str, size: tuple[int, int]) -> dict[str, Decode]:
    found: dict[str, Decode] = {"pillow_full": pillow_full}
    for name, requests in (("ours", [REQUEST]), ("ours_base", BASE)):
        found |= {name: partial(ours, requests), f"{name}_for_gpu": partial(ours_for_gpu, requests)}
    if image_format == "JPEG":
        found |= {"ours_in_pool_on_cpu": partial(ours_in_pool, DeviceDecoder([REQUEST], "cpu"))}
        found |= {"pillow_draft": pillow_draft, "opencv_reduced": partial(opencv_reduced, size)}
    if image_format == "HEIC":  # which the others do not read
        return found
    return found | {"torchvision": torchvision, "opencv": opencv}


def measure(image_format: str, size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """All sides on the same image, turn about."""
    data = encoded(scene(*size, seed=1), image_format)
    by_side = sides(image_format, size)
    reference = pillow_full(data).astype(int)
    errors = {side: np.abs(call(data).astype(int) - reference) for side, call in by_side.items()}
    seconds: dict[str, list[float]] = {side: [] for side in by_side}
    for _ in range(repeats):
        for side, call in by_side.items():
            started = time.process_time()
            call(data)
            seconds[side].append(time.process_time() - started)
    return [
        {
            "format": image_format,
            "width": size[0],
            "height": size[1],
            "bytes": len(data),
            "side": side,
            "images_per_core_second": round(1 / min(times), 2),
            "mean_error": round(float(errors[side].mean()), 3),
            "error_of_99_9_percent": float(np.percentile(errors[side], 99.9)),
        }
        for side, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--format", choices=FORMATS, help="this one alone, with a result of its own; default: all")
    add_results_option(parser)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torchvision's, of its decoders
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    versions = {"opencv": cv2.__version__}
    if "HEIC" in FORMATS:
        import pillow_heif

        pillow_heif.register_heif_opener(decode_threads=1)
        versions["libheif"] = pillow_heif.libheif_version()
    load_before = os.getloadavg()
    formats = [options.format] if options.format else FORMATS
    runs = [run for size in SIZES for kind in formats for run in measure(kind, size, options.repeats)]
    for run in runs:
        print(
            f"{run['format']:>5} {run['width']:>5} {run['side']:>20}: {run['images_per_core_second']:8.1f}/core-s, "
            f"mean error {run['mean_error']:.2f}, 99.9% within {run['error_of_99_9_percent']:.0f}"
        )
    result: dict[str, object] = {
        "workload": f"one image of each size and format, to {SIDE} x {SIDE}, one thread, best of {options.repeats}",
        **versions,
        "load_before_and_after": [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())],
        "runs": runs,
    }
    name = f"decode-{options.format.lower()}" if options.format else "decode"
    print(save_result(name, result, options.results))


if __name__ == "__main__":
    main()
