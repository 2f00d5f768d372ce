"""What only a GPU can show: nvJPEG against Pillow, feeding beside the computation, a ceiling in bfloat16."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.images import encode, with_orientation
from tests.unit.engine.test_feeding import LARGE, LIMITS, REQUESTS, SMALL, read
from tests.unit.imaging.test_colours import P3, icc
from tests.unit.imaging.test_device import REQUESTS as DEVICE_REQUESTS
from tests.unit.imaging.test_device import greatest_difference, left
from tests.unit.imaging.test_jpeg_draft import photograph
from vlmflow.config import PoolConfig
from vlmflow.device_errors import release_memory
from vlmflow.engine.decoding import PoolDecoding
from vlmflow.engine.feeding import Feeder
from vlmflow.engine.flops import matmul_ceiling
from vlmflow.engine.loading import room_for, set_up_torch
from vlmflow.imaging import PixelRequest
from vlmflow.imaging.device import DeviceDecoder, DeviceImage
from vlmflow.imaging.jpeg import leave_encoded
from vlmflow.imaging.profiles import read_profile
from vlmflow.imaging.shapers import shaper_of
from vlmflow.tasks.pixels import all_views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_driver_has_threads_sleep_while_they_wait() -> None:
    """In a process of its own, as actors are: where there is a context, the flags are those of its beginning."""
    script = """
import ctypes, torch
from vlmflow.config import PoolConfig
from vlmflow.engine.loading import set_up_torch
set_up_torch(PoolConfig(tasks=("embed",), gpus=1))
torch.ones(1, device="cuda").sum().item()
flags, is_active = ctypes.c_uint(), ctypes.c_int()
assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(is_active)) == 0
print(is_active.value, flags.value & 7)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout.split() == ["1", "4"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_nvjpeg_and_our_resize_give_pillows_pixels_to_a_few_levels(orientation: int) -> None:
    data = with_orientation(photograph(400, 1).resize((400, 300)), orientation, quality=90)
    (image,) = DeviceDecoder(DEVICE_REQUESTS, "cuda")([left(data)])
    assert image is not None, "nvJPEG must not refuse an ordinary JPEG"
    on_processor = DeviceImage({key: value.cpu() for key, value in image.pixels.items()}, image.views)
    # Decoders differ in how they spread colour over the pixels between its samples.
    assert greatest_difference(data, on_processor) <= 12


def test_colours_are_shaped_as_by_a_processor() -> None:
    """Of some images of a batch, whose others stay as they are."""
    files = [left(encode(photograph(400, seed), "JPEG", quality=90)) for seed in range(3)]
    profile = read_profile(icc(primaries=P3))
    assert profile is not None
    shaper = shaper_of(profile)
    assert shaper is not None
    files[1] = replace(files[1], shaper=shaper.to_bytes())
    plain = DeviceDecoder(DEVICE_REQUESTS, "cuda")([replace(file, shaper=None) for file in files])
    for number, (before, image) in enumerate(zip(plain, DeviceDecoder(DEVICE_REQUESTS, "cuda")(files), strict=True)):
        assert before is not None
        assert image is not None
        for key, pixels in image.pixels.items():
            given = before.pixels[key].cpu().numpy()
            expected = shaper.apply(given) if number == 1 else given
            assert np.abs(pixels.cpu().numpy().astype(int) - expected).max() <= 1


def test_a_damaged_scan_that_libjpeg_accepts_shows_nothing_of_other_images() -> None:
    """Whatever picture the device makes of it, or that it refuses it, does not depend on what was decoded before."""
    random, damaged = np.random.default_rng(0), []
    # libjpeg notices noise at once unless every code means something, as those made for one picture do.
    for whole, width in (
        (encode(photograph(400, 1), "JPEG", quality=90, optimize=of_its_own), width)
        for of_its_own, width in [(False, 1), (True, 64)]
        for _ in range(60)
    ):
        data = bytearray(whole)
        at = int(random.integers(whole.index(b"\xff\xda") + 14, len(whole) - 70))
        data[at : at + width] = bytes(value ^ int(random.integers(1, 255)) for value in data[at : at + width])
        file = leave_encoded(bytes(data), DEVICE_REQUESTS, LIMITS, "")
        if file is not None:
            damaged.append(file)
    assert len(damaged) > 24
    decoder = DeviceDecoder(DEVICE_REQUESTS, "cuda")
    found = []
    for seed in range(4):
        others = [left(encode(photograph(400, 10 * seed + number), "JPEG", quality=90)) for number in range(25)]
        others = [others[number % 25] for number in range(len(damaged))]
        assert all(decoder(others))
        images = decoder([file for pair in zip(others, damaged, strict=True) for file in pair])[1::2]
        found.append([image and {key: value.cpu().numpy() for key, value in image.pixels.items()} for image in images])
    for images in found[1:]:
        for number, (image, first) in enumerate(zip(images, found[0], strict=True)):
            assert (image is None) == (first is None), number
            for key in first or {}:
                np.testing.assert_array_equal(image[key], first[key], err_msg=str(number))


def test_batches_fed_by_two_threads_are_those_of_a_processor(tmp_path: Path) -> None:
    for number in range(40):
        data = with_orientation(photograph(200 + 40 * (number % 3), number), 1 + number % 8, quality=90)
        (tmp_path / f"{number:02d}.jpg").write_bytes(data)
    batch = read(tmp_path, leaves_jpegs=True)
    decoding = PoolDecoding(REQUESTS, LIMITS)
    expected = Feeder(REQUESTS, (), "cpu", decoding)(batch)
    feeder = Feeder(REQUESTS, (LARGE,), "cuda", decoding)

    def use(_: int) -> list[str]:
        failures = []
        for _ in range(5):
            fed = feeder(batch)
            with feeder.lent(fed):
                for request in (SMALL, LARGE):
                    pixels, _ = all_views(fed.batch, request)
                    assert pixels.is_cuda
                    theirs = expected.views[request.key].pixels
                    difference = (pixels.cpu().int() - theirs.int()).abs().float().mean()
                    if difference > 1.5:
                        failures.append(f"{request.key}: {difference:.2f}")
            passed = feeder.finish(fed.batch, fed)["pixels_40_bicubic"]
            if passed.null_count or not isinstance(passed, pa.ChunkedArray):
                failures.append("pixels for later pools are missing")
        return failures

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(use, range(2))) == [[], []]


@pytest.fixture
def _all_of_the_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("_all_of_the_memory")
def test_an_actor_keeps_to_its_part_of_a_gpu() -> None:
    _, total = torch.cuda.mem_get_info()
    set_up_torch(PoolConfig(tasks=("embed",), gpus=0.1))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total // 8, dtype=torch.uint8, device="cuda")
    assert room_for(PoolConfig(tasks=("embed",), gpus=0.1, batch_size=256)).rows is not None


@pytest.mark.usefixtures("_all_of_the_memory")
def test_with_little_memory_left_jpegs_are_decoded_in_smaller_parts() -> None:
    """By torch's own allocator: nvJPEG's memory is not in this limit, and what it says without is yet to be seen."""
    requests = [PixelRequest(384, "bicubic", ("squash",))]
    data = encode(photograph(400, 1).resize((2000, 1500)), "JPEG", quality=90)
    file = leave_encoded(data, requests, LIMITS, "")
    assert file is not None
    decoder = DeviceDecoder(requests, "cuda")
    (expected,) = decoder([file])
    assert expected is not None
    release_memory()
    # Of 16 images 144 MB of bytes and 288 MB of halves.
    limit = torch.cuda.memory_reserved() + 200_000_000
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    found = decoder([file] * 16)
    assert decoder._pixels_at_once < 16 * 2000 * 1500
    for image in found:
        assert image is not None, "none is left to a processor"
        assert (image.pixels["384_bicubic"].int() - expected.pixels["384_bicubic"].int()).abs().max() <= 1


def test_the_ceiling_is_that_of_tensor_cores() -> None:
    half, single = (matmul_ceiling("cuda", dtype) for dtype in (torch.bfloat16, torch.float32))
    assert np.isfinite(half)
    assert half > 2 * single
