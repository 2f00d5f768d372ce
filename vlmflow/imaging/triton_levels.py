"""Levels of pixels as kernels in Triton: torch converts bytes on CUDA at a third of the memory's speed, and makes the
coefficients of a resize in some twenty kernels.

Imported where CUDA is at hand, see :mod:`vlmflow.models.fused`: Triton is no part of torch's builds for processors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_BLOCK = 4096
_ALIGNED = 16  # bytes that are read at once


@triton.jit  # type: ignore[untyped-decorator]
def _stack(addresses, out, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(1)
    source = tl.load(addresses + image).to(tl.pointer_type(tl.uint8))
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    levels = tl.load(tl.multiple_of(source + at, [16]), mask=inside, other=0)
    tl.store(out + image.to(tl.int64) * size + at, levels.to(out.dtype.element_ty), mask=inside)


def aligned(image: torch.Tensor) -> bool:
    """Whether it begins where as much can be read at once as a GPU can; torch's allocator begins all tensors so."""
    return image.data_ptr() % _ALIGNED == 0


def stack(images: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Images one behind the other, converted on their way: all at once, where copies would start a kernel for each.

    Args:
        images: uint8, contiguous, of one shape, each :func:`aligned`.
        out: (N, *shape) of any floating dtype, contiguous.

    Returns:
        ``out``.
    """
    if images and (size := images[0].numel()):
        starts = torch.tensor([image.data_ptr() for image in images])
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            # Pinned, or the copy would wait for all that is queued on the stream.
            addresses = starts.pin_memory().to(out.device, non_blocking=True) if out.is_cuda else starts
            _stack[(triton.cdiv(size, _BLOCK), len(images))](addresses, out, size, block=_BLOCK, num_warps=8)
    return out


@triton.jit(do_not_specialize=("size",))  # type: ignore[untyped-decorator]
def _to_levels(values, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    value = (value + 8388608.0) - 8388608.0  # a sum of so much has no fraction left, and rounds halves to even
    tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)


def to_levels(values: torch.Tensor) -> torch.Tensor:
    """Rounds to whole numbers from 0 to 255, in place; halves to even.

    Args:
        values: contiguous, of any floating dtype.

    Returns:
        The same tensor.
    """
    if size := values.numel():
        with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
            _to_levels[(triton.cdiv(size, _BLOCK),)](values, size, block=_BLOCK, num_warps=8)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _weights(places, center, widened, first, behind, bicubic: tl.constexpr):  # type: ignore[no-untyped-def]
    distance = tl.abs((places - center + 0.5) / widened)
    if bicubic:
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
        weights = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        weights = tl.maximum(1.0 - distance, 0.0)
    return tl.where((places >= first) & (places < behind), weights, 0.0)


@triton.jit(do_not_specialize=("length",))  # type: ignore[untyped-decorator]
def _coefficients(  # type: ignore[no-untyped-def]
    out, length, start, start_rest, scale, scale_rest, bicubic: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0)
    none = tl.zeros([1], tl.float64)  # what is added to it is in double precision
    wide = none + scale + scale_rest
    center = none + start + start_rest + (row.to(tl.float64) + 0.5) * wide
    widened = tl.maximum(wide, 1.0)
    support = widened * 2.0 if bicubic else widened
    first, behind = tl.floor(center - support + 0.5), tl.floor(center + support + 0.5)
    total = tl.zeros([block], tl.float64)
    for at in range(0, length, block):
        columns = at + tl.arange(0, block)
        weights = _weights(columns.to(tl.float64), center, widened, first, behind, bicubic)
        total += tl.where(columns < length, weights, 0.0)
    for at in range(0, length, block):
        columns = at + tl.arange(0, block)
        weights = _weights(columns.to(tl.float64), center, widened, first, behind, bicubic) / tl.sum(total)
        tl.store(out + row.to(tl.int64) * length + columns, weights.to(out.dtype.element_ty), mask=columns < length)


def coefficients(out: torch.Tensor, start: float, end: float, interpolation: str) -> torch.Tensor:
    """Those of :func:`vlmflow.imaging.device.coefficients`, in one kernel.

    Args:
        out: (size, length) of any floating dtype, contiguous.

    Returns:
        ``out``.
    """
    size, length = out.shape
    scale = (end - start) / size
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        numbers = (*_in_two(start), *_in_two(scale))
        _coefficients[(size,)](out, length, *numbers, bicubic=interpolation == "bicubic", block=512)
    return out


def _in_two(number: float) -> tuple[float, float]:
    """Triton takes a number in single precision: what that leaves of it comes as another."""
    first = torch.tensor(number, dtype=torch.float32).item()
    return first, number - first
