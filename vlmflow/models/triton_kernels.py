"""Kernels in Triton, where memory is all that an operation costs: what is needed is read once and written once.

Imported where CUDA is at hand, see :mod:`vlmflow.models.fused`: Triton is no part of torch's builds for processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    states,
    added,
    offset,
    weight,
    bias,
    summed,
    normed,
    width,
    eps,
    adds: tl.constexpr,
    keeps: tl.constexpr,
    shifts: tl.constexpr,
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
    if shifts:
        x += tl.load(offset + columns, mask=inside, other=0.0)
    mean = tl.sum(x, axis=0) / width
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / width
    y = centered * tl.rsqrt(variance + eps)
    if scales:
        y = y * tl.load(weight + columns, mask=inside, other=0.0) + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class NormOf:
    """What a norm is made with.

    Attributes:
        scale: weight and bias, (D,) float32 each; None: it has none.
        dtype: of what it gives.
    """

    scale: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    dtype: torch.dtype


def norm(
    how: NormOf,
    states: torch.Tensor,
    added: torch.Tensor | None = None,
    *,
    offset: torch.Tensor | None = None,
    keeps_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in the dtype of ``states``, and the layer norm of it and ``offset``; computed in float32.

    Args:
        states: (..., D), contiguous, as is ``added``; a row is held in the registers of its warps.
        added: None: nothing is.
        offset: (D,) float32, contiguous; None: there is none.
        keeps_sum: False: the sum is not written, and rounded to no dtype; ``states`` takes its place.
    """
    width = states.shape[-1]
    keeps = added is not None and keeps_sum
    summed = torch.empty_like(states) if keeps else states
    normed = torch.empty_like(states, dtype=how.dtype)
    weight, bias = how.scale or (states, states)  # never read then, nor is what else is not there
    if num_rows := states.numel() // width:
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
            _norm[(num_rows,)](
                states,
                states if added is None else added,
                states if offset is None else offset,
                weight,
                bias,
                summed,
                normed,
                width,
                how.eps,
                adds=added is not None,
                keeps=keeps,
                shifts=offset is not None,
                scales=how.scale is not None,
                block=block,
                num_warps=max(1, min(16, block // 256)),
            )
    return summed, normed


@triton.jit  # type: ignore[untyped-decorator]
def _attend_step(  # type: ignore[no-untyped-def]
    projected,
    keys,
    values,
    position,
    out,
    heads,
    length,
    dim,
    scale,
    tokens: tl.constexpr,
    block: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # of a row and a head
    row = pair // heads
    columns = tl.arange(0, block)
    inside = columns < dim
    own = projected + 3 * row * heads * dim + (pair - row * heads) * dim + columns
    query = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(own + heads * dim, mask=inside, other=0.0)
    value = tl.load(own + 2 * heads * dim, mask=inside, other=0.0)
    now = tl.load(position)
    kept = pair * length * dim + columns
    tl.store(keys + kept + now * dim, key, mask=inside)
    tl.store(values + kept + now * dim, value, mask=inside)
    token = tl.arange(0, tokens)
    seen = token < now
    places = kept[None, :] + token[:, None] * dim
    visible = seen[:, None] & inside[None, :]
    scores = tl.sum(tl.load(keys + places, mask=visible, other=0.0).to(tl.float32) * query[None, :], axis=1)
    scores = tl.where(seen, scores, float("-inf"))
    score = tl.sum(key.to(tl.float32) * query, axis=0)
    highest = tl.maximum(tl.max(scores, axis=0), score)
    weights, weight = tl.exp(scores - highest), tl.exp(score - highest)
    context = tl.sum(tl.load(values + places, mask=visible, other=0.0).to(tl.float32) * weights[:, None], axis=0)
    context = (context + weight * value.to(tl.float32)) / (tl.sum(weights, axis=0) + weight)
    tl.store(out + pair * dim + columns, context.to(out.dtype.element_ty), mask=inside)


def attend_step(
    projected: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Keeps the keys and values of a token, and has it attend to those up to it; computed in float32.

    Args:
        projected: (N, 1, 3 H d), contiguous: its queries, keys and values.
        keys: (N, H, L, d), contiguous, as are the values.
        position: (1,) int64, below L.

    Returns:
        (N, 1, H d).
    """
    num_rows, num_heads, length, dim = keys.shape
    out = projected.new_empty((num_rows, 1, num_heads * dim))
    if num_rows:
        with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
            _attend_step[(num_rows * num_heads,)](
                projected,
                keys,
                values,
                position,
                out,
                num_heads,
                length,
                dim,
                dim**-0.5,
                tokens=triton.next_power_of_2(length),
                block=triton.next_power_of_2(dim),
                num_warps=2,
            )
    return out
