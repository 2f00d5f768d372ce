"""JPEGs decoded and resized on the device that runs the models: nvJPEG on CUDA, libjpeg on a processor.

Resizing is done as two matrix products with the very coefficients of Pillow, which know any box and any number of equal
images at once; rounded in between as Pillow does. That gives Pillow's pixels to a level or two of 255, in single and in
half precision. Imported by workers alone: it needs torch.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image

from vlmflow.device_errors import is_device_broken, is_out_of_memory, release_memory
from vlmflow.errors import ClusterError
from vlmflow.imaging.decode import PixelRequest, merge_requests
from vlmflow.imaging.jpeg import EncodedJpeg
from vlmflow.imaging.pixels import boxes, names_of
from vlmflow.imaging.resizing import Box
from vlmflow.imaging.shapers import SRGB_EXPONENT, SRGB_OFFSET, SRGB_SLOPE, SRGB_START, Shaper
from vlmflow.models.fused import attempt, can_fuse
from vlmflow.models.upload import numbers, to_device

logger = logging.getLogger("vlmflow")

# Of the images that are held in full size at once: on CUDA 200 MB as bytes and 400 MB as halves, on a processor an
# eighth of that, in single precision.
_PIXELS_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 22}
# Products are cheap beside building their coefficients; each set takes about a megabyte.
_MAX_COEFFICIENTS = 64
_CUBIC = -0.5  # Pillow's
# Which of the two products comes first decides how the levels between them round. Pillow 13 begins with the columns of
# images that are this much higher than wide; found by trying.
_HIGH = 1.2
# As torchvision passes on that nvJPEG, which allocates by itself, found no memory: its status ALLOCATOR_FAILURE.
_NVJPEG_RAN_OUT = re.compile(r"Failed to [a-z ]+: 5\b")


_Key = tuple[int, float, float, int, str]  # the arguments of :func:`coefficients`


@dataclass(frozen=True)
class DeviceImage:
    """Views of an image on the device, by the key of their request.

    Attributes:
        pixels: (V, S, S, 3) uint8.
        views: their V names.
    """

    pixels: dict[str, torch.Tensor]
    views: dict[str, list[str]]


class DeviceDecoder:
    """Decodes on one device; one per worker, for any number of threads.

    Args:
        requests: what each image is to be shown as.
        dtype: of the products; None: half precision on CUDA, single on a processor.

    Raises:
        ClusterError: torchvision cannot decode JPEGs on this device.
    """

    def __init__(self, requests: Sequence[PixelRequest], device: str, dtype: torch.dtype | None = None) -> None:
        self._requests = merge_requests(requests)
        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._dtype = dtype or (torch.float16 if is_cuda else torch.float32)
        self._threads = threading.local()
        self._has_told = False
        # Less once memory has run out, with a part of which a half was to be tried.
        self._pixels_at_once = _PIXELS_AT_ONCE[self._device.type]
        try:
            # Imported here: workers that leave no JPEG to their device do without what torchvision means to drop.
            from torchvision.io import ImageReadMode, decode_jpeg

            self._decode_jpeg, self._mode = decode_jpeg, ImageReadMode.RGB
            self._decode_all([_a_jpeg()])
        except (ImportError, RuntimeError) as error:
            if is_device_broken(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"torchvision cannot decode JPEGs on {device}: {reason}",
                remedy="Set `decode: cpu` in the job, or install a torchvision that was built with nvJPEG.",
            ) from error

    def __call__(self, files: Sequence[EncodedJpeg]) -> list[DeviceImage | None]:
        """The images in order; None: refused, for whatever reason, and a processor must try it.

        Where memory runs out, half of a part is tried, down to one image, and parts are no larger from then on.

        Raises:
            torch.AcceleratorError: the device is broken.
        """
        images: list[DeviceImage | None] = [None] * len(files)
        pending = _parts(files, self._pixels_at_once)[::-1]
        while pending:
            part, ran_out = pending.pop(), False
            halves = _in_halves(part)
            if halves and _num_pixels(files, part) > self._pixels_at_once:
                pending += halves[::-1]
                continue
            try:
                decoded = dict(zip(part, self._decode([files[number].data for number in part]), strict=True))
                for group in _alike(files, part):
                    shown = self._show([(files[number], decoded[number]) for number in group])
                    for number, image in zip(group, shown, strict=True):
                        images[number] = image
            except RuntimeError as error:
                if is_device_broken(error):
                    raise
                ran_out = _ran_out(error)
                if not ran_out or not halves:
                    self._tell(error, len(part))
            if ran_out:  # past the handler, whose traceback kept the part's tensors
                release_memory()
                pending += halves[::-1]
                self._pixels_at_once = min([self._pixels_at_once, *(_num_pixels(files, half) for half in halves)])
        return images

    def _show(self, pairs: Sequence[tuple[EncodedJpeg, torch.Tensor | None]]) -> list[DeviceImage | None]:
        """Images of one size and orientation, with what was decoded of them."""
        file = pairs[0][0]
        width, height = file.facts.width, file.facts.height
        expected = (3, width, height) if file.orientation >= 5 else (3, height, width)
        kept = {
            number: image for number, (_, image) in enumerate(pairs) if image is not None and image.shape == expected
        }
        images: list[DeviceImage | None] = [None] * len(pairs)
        if not kept:
            return images
        out = torch.empty((len(kept), *expected), dtype=self._dtype, device=self._device)
        pixels, views = self._views(oriented(_stack(list(kept.values()), out), file.orientation))
        self._shape_colours(pixels, [pairs[number][0].shaper for number in kept])
        for at, number in enumerate(kept):
            images[number] = DeviceImage({key: value[at] for key, value in pixels.items()}, views)
        return images

    def _shape_colours(self, pixels: dict[str, torch.Tensor], shapers: Sequence[bytes | None]) -> None:
        """Brings views, (N, V, S, S, 3) each, to sRGB in place, by the shaper of each of the N images."""
        for shaper in dict.fromkeys(found for found in shapers if found is not None):
            of = [number for number, found in enumerate(shapers) if found == shaper]
            parts = Shaper.from_bytes(shaper)
            light, mixed = (to_device(torch.from_numpy(part.copy()), self._device) for part in parts)
            rows = None if len(of) == len(shapers) else numbers(of, self._device)
            for levels in pixels.values():
                if rows is None:
                    levels.copy_(shaped(levels, light, mixed))
                else:
                    levels.index_copy_(0, rows, shaped(levels.index_select(0, rows), light, mixed))

    def _decode(self, files: Sequence[bytes | memoryview]) -> list[torch.Tensor | None]:
        """(3, H, W) uint8 each; of a batch of which one is refused, all are tried alone.

        Raises:
            RuntimeError: there is no memory left for so many, or the device is broken.
        """
        try:
            return list(self._decode_all(files))
        except RuntimeError as error:
            if is_device_broken(error) or _ran_out(error):
                raise
            if len(files) > 1:
                return [self._decode([data])[0] for data in files]
            self._tell(error, 1)
            return [None]

    def _decode_all(self, files: Sequence[bytes | memoryview]) -> list[torch.Tensor]:
        """(3, H, W) uint8 each.

        Raises:
            RuntimeError: one of them cannot be decoded.
        """
        if self._device.type == "cuda":
            # torchvision takes memory that belongs to this stream and writes to it on one of its own, which does not
            # wait for what is still queued here.
            torch.cuda.current_stream().synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
            buffers = [torch.frombuffer(data, dtype=torch.uint8) for data in files]
        decoded: list[torch.Tensor] = self._decode_jpeg(buffers, self._mode, device=self._device)
        return decoded

    def _tell(self, error: RuntimeError, num_images: int) -> None:
        """Says once why images go to a processor: one is likely damaged, and many are a matter of this machine."""
        level = logging.DEBUG if self._has_told else logging.WARNING
        self._has_told = True
        reason = " ".join(str(error).split())[:200]
        logger.log(level, "%s left %d JPEGs to the processor: %s", self._device, num_images, reason)

    def _views(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
        """(N, 3, H, W) of levels -> by the key of each request (N, V, S, S, 3) uint8, and the names of the V views."""
        height, width = images.shape[2:]
        pixels, names = {}, {}
        # By what is shown and which product comes first: requests with the numbers of their views, which share it.
        groups: dict[tuple[Box | None, bool], list[tuple[PixelRequest, int]]] = {}
        for request in self._requests:
            size, is_high = request.size, height > _HIGH * width and height > request.size
            wanted = [pair for view in names_of(request.views) for pair in boxes(view, (width, height), size)]
            names[request.key] = [name for name, _ in wanted]
            shape = (len(images), len(wanted), size, size, 3)
            pixels[request.key] = torch.empty(shape, dtype=torch.uint8, device=self._device)
            for number, (_, box) in enumerate(wanted):
                groups.setdefault((box, is_high), []).append((request, number))
        for (box, is_high), members in groups.items():
            resized = self._resize(images, box, [request for request, _ in members], is_high)
            for (request, number), levels in zip(members, resized, strict=True):
                pixels[request.key][:, number].copy_(levels.permute(0, 2, 3, 1))
        return pixels, names

    def _resize(
        self, images: torch.Tensor, box: Box | None, requests: Sequence[PixelRequest], is_high: bool
    ) -> list[torch.Tensor]:
        """(N, 3, H, W) of levels -> for each request (N, 3, S, S) of levels; full-size pixels are read once for all."""
        height, width = images.shape[2:]
        left, top, right, bottom = box or (0, 0, width, height)
        across = [self._matrix((width, left, right, request.size, request.interpolation)) for request in requests]
        down = [self._matrix((height, top, bottom, request.size, request.interpolation)) for request in requests]
        sizes = [request.size for request in requests]
        if is_high:
            columns = torch.split(_as_levels(torch.matmul(torch.cat(down), images)), sizes, dim=2)
            return [_as_levels(torch.matmul(part, matrix.T)) for part, matrix in zip(columns, across, strict=True)]
        rows = torch.split(_as_levels(torch.matmul(images, torch.cat(across).T)), sizes, dim=3)
        return [_as_levels(torch.matmul(matrix, part)) for matrix, part in zip(down, rows, strict=True)]

    def _matrix(self, key: _Key) -> torch.Tensor:
        # Each thread has its own: work of other streams neither waits for what this one's kernels write, nor is waited
        # for when memory is given back.
        if not hasattr(self._threads, "coefficients"):
            self._threads.coefficients = OrderedDict()
        kept: OrderedDict[_Key, torch.Tensor] = self._threads.coefficients
        matrix = kept.pop(key, None)
        if matrix is None:
            while len(kept) >= _MAX_COEFFICIENTS:
                kept.popitem(last=False)
            matrix = self._coefficients(*key)
        kept[key] = matrix
        return matrix

    def _coefficients(self, length: int, start: float, end: float, size: int, interpolation: str) -> torch.Tensor:
        matrix = torch.empty((size, length), dtype=self._dtype, device=self._device)
        if can_fuse(matrix):
            from vlmflow.imaging import triton_levels

            if attempt(triton_levels.coefficients, matrix, start, end, interpolation) is not None:
                return matrix
        return coefficients(length, start, end, size, interpolation, self._device).to(self._dtype)


def coefficients(
    length: int, start: float, end: float, size: int, interpolation: str, device: torch.device
) -> torch.Tensor:
    """How much each of ``length`` pixels counts in each of ``size``, which show those from start to end.

    As Pillow's ``precompute_coeffs``: the filter is widened by the factor of the reduction.

    Returns:
        (size, length) float64; every row sums to 1.
    """
    scale = (end - start) / size
    widened = max(scale, 1.0)
    support = (2.0 if interpolation == "bicubic" else 1.0) * widened
    centers = start + (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * scale
    centers = centers.unsqueeze(1)
    places = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(0)
    first = (centers - support + 0.5).floor().clamp_(min=0)
    behind = (centers + support + 0.5).floor().clamp_(max=length)
    distance = ((places - centers + 0.5) / widened).abs_()
    weights = _cubic(distance) if interpolation == "bicubic" else (1 - distance).clamp_(min=0)
    weights *= (places >= first) & (places < behind)
    return weights / weights.sum(dim=1, keepdim=True)


def oriented(images: torch.Tensor, orientation: int) -> torch.Tensor:
    """(N, 3, H, W) turned and mirrored as the EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        images = images.transpose(2, 3)
    flips = {2: (3,), 3: (2, 3), 4: (2,), 6: (3,), 7: (2, 3), 8: (2,)}.get(orientation)
    return images.flip(flips) if flips else images


def shaped(levels: torch.Tensor, light: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """(..., 3) uint8 -> the same in sRGB; light and mixed those of a :class:`vlmflow.imaging.shapers.Shaper`."""
    offsets = 256 * torch.arange(3, dtype=torch.int32, device=levels.device)
    found = light.flatten()[levels.to(torch.int32).add_(offsets)]
    # No matrix product: that may be computed in TF32, of ten bits.
    mixture = found[..., :1] * mixed[:, 0]
    mixture.addcmul_(found[..., 1:2], mixed[:, 1]).addcmul_(found[..., 2:], mixed[:, 2]).clamp_(0, 1)
    bent = mixture.pow(SRGB_EXPONENT).mul_(1 + SRGB_OFFSET).sub_(SRGB_OFFSET)
    bent = torch.where(mixture <= SRGB_START, mixture * SRGB_SLOPE, bent)
    return bent.mul_(255).round_().to(torch.uint8)


def _stack(images: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """(3, H, W) uint8 each -> ``out``, (N, 3, H, W) of levels, converted on their way to it."""
    if can_fuse(out, *images):
        from vlmflow.imaging import triton_levels

        if all(map(triton_levels.aligned, images)) and attempt(triton_levels.stack, images, out) is not None:
            return out
    for place, image in zip(out, images, strict=True):
        place.copy_(image)  # bytes stacked first would be one more pass over all pixels
    return out


def _as_levels(values: torch.Tensor) -> torch.Tensor:
    if can_fuse(values):
        from vlmflow.imaging import triton_levels

        if attempt(triton_levels.to_levels, values) is not None:
            return values
    return values.round_().clamp_(0, 255)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * _CUBIC
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _shape(file: EncodedJpeg) -> tuple[int, int, int]:
    return file.facts.width, file.facts.height, file.orientation


def _parts(files: Sequence[EncodedJpeg], pixels_at_once: int) -> list[list[int]]:
    """Numbers of files, those of one shape together, so many at once as memory is meant to hold."""
    parts: list[list[int]] = []
    left = 0
    for number in sorted(range(len(files)), key=lambda number: _shape(files[number])):
        width, height, _ = _shape(files[number])
        if width * height > left or not parts:
            parts.append([])
            left = pixels_at_once
        parts[-1].append(number)
        left -= width * height
    return parts


def _in_halves(part: Sequence[int]) -> list[list[int]]:
    """Nothing of a single image."""
    half = len(part) // 2
    return [list(part[:half]), list(part[half:])] if half else []


def _num_pixels(files: Sequence[EncodedJpeg], part: Sequence[int]) -> int:
    return sum(files[number].facts.width * files[number].facts.height for number in part)


def _ran_out(error: RuntimeError) -> bool:
    return is_out_of_memory(error) or _NVJPEG_RAN_OUT.search(str(error)) is not None


def _alike(files: Sequence[EncodedJpeg], numbers: Sequence[int]) -> list[list[int]]:
    """The same numbers by the size and orientation of their files."""
    by_shape: dict[tuple[int, int, int], list[int]] = {}
    for number in numbers:
        by_shape.setdefault(_shape(files[number]), []).append(number)
    return list(by_shape.values())


def _a_jpeg() -> bytes:
    sink = BytesIO()
    Image.new("RGB", (16, 16), "red").save(sink, "JPEG")
    return sink.getvalue()
