"""The Triton kernel of :mod:`vlmflow.models.norm`: a sum and its layer norm, read once and written once.

Imported where CUDA is at hand: Triton is no part of torch's builds for processors.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    states,
    added,
    weight,
    bias,
    summed,
    normed,
    width,
    eps,
    adds: tl.constexpr,
    keeps: tl.constexpr,
    scales: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    at = row * width + columns
    x = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        x += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        if keeps:
            # What is normalised is what is carried on, rounded as that is.
            rounded = x.to(summed.dtype.element_ty)
            tl.store(summed + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / width
    y = centered * tl.rsqrt(variance + eps)
    if scales:
        y = y * tl.load(weight + columns, mask=inside, other=0.0) + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    states: torch.Tensor,
    added: torch.Tensor | None,
    scale: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    *,
    keeps_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in the dtype of ``states``, and its layer norm; of all but a lone ``states`` that is float32.

    Args:
        states: (..., D), contiguous, as is ``added``; a row is held in the registers of its warps.
        added: None: nothing is.
        scale: weight and bias, (D,) float32 each; None: the norm has none.
        dtype: of the norm.
        keeps_sum: False: the sum is not written, and rounded to no dtype; ``states`` takes its place.
    """
    width = states.shape[-1]
    keeps = added is not None and keeps_sum
    summed = torch.empty_like(states) if keeps else states
    normed = torch.empty_like(states, dtype=dtype)
    weight, bias = scale or (states, states)  # never read then
    num_rows = states.numel() // width
    if num_rows:
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
            _add_norm[(num_rows,)](
                states,
                states if added is None else added,
                weight,
                bias,
                summed,
                normed,
                width,
                eps,
                adds=added is not None,
                keeps=keeps,
                scales=scale is not None,
                block=block,
                num_warps=max(1, min(16, block // 256)),
            )
    return summed, normed
