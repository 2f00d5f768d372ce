"""Norms as a kernel in Triton: memory is all that they cost, so what is needed is read once and written once.

Imported where CUDA is at hand, see :mod:`vlmflow.models.fused`: Triton is no part of torch's builds for processors.
Here as in our other kernels Triton is not to specialize what changes from batch to batch: it would compile all of them
anew for the first number of rows that is no multiple of 16, which takes seconds at the end of a job.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit(do_not_specialize=("num_rows",))  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    states,
    added,
    offset,
    weight,
    bias,
    summed,
    normed,
    rounded,
    num_rows,
    width,
    eps,
    adds: tl.constexpr,
    keeps: tl.constexpr,
    shifts: tl.constexpr,
    scales: tl.constexpr,
    rounds: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    columns = tl.arange(0, block)
    is_column = columns < width
    inside = (row < num_rows)[:, None] & is_column[None, :]
    at = row.to(tl.int64)[:, None] * width + columns[None, :]
    x = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        x += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        if keeps:
            # What is normalised is what is carried on, rounded as that is.
            sums = x.to(summed.dtype.element_ty)
            tl.store(summed + at, sums, mask=inside)
            x = sums.to(tl.float32)
    if shifts:
        x += tl.load(offset + columns, mask=is_column, other=0.0)[None, :]
    mean = tl.sum(x, axis=1) / width
    centered = tl.where(is_column[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / width
    y = centered * tl.rsqrt(variance + eps)[:, None]
    if scales:
        y *= tl.load(weight + columns, mask=is_column, other=0.0)[None, :]
        y += tl.load(bias + columns, mask=is_column, other=0.0)[None, :]
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)
    if rounds:
        tl.store(rounded + at, y.to(rounded.dtype.element_ty), mask=inside)


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


@dataclass(frozen=True)
class Normed:
    """What the kernel of norms gives, (..., D) each.

    Attributes:
        summed: what was normalised, in the dtype of the states, but for the offset.
        rounded: the norm in the dtype that was asked for besides; itself where none was.
    """

    summed: torch.Tensor
    normed: torch.Tensor
    rounded: torch.Tensor


@dataclass(frozen=True)
class NormSizes:
    """Of a program: the rows that it takes, which share a read of weight and bias, and its warps.

    On an H100 147,712 rows of 768 in bfloat16 take 163 us by 2 rows and 2 warps, 158 by 4 and 4, 259 by a row and 4
    warps; 256 rows in float32 take 2.8, 3.1 and 2.5 us.
    """

    rows: int
    num_warps: int

    @classmethod
    def of(cls, block: int) -> NormSizes:
        """For rows of so many elements, held in registers."""
        return cls(2, 2) if block <= 1024 else cls(1, min(16, block // 256))


def norm(
    how: NormOf,
    states: torch.Tensor,
    added: torch.Tensor | None = None,
    *,
    offset: torch.Tensor | None = None,
    keeps_sum: bool = True,
    also: torch.dtype | None = None,
    sizes: NormSizes | None = None,
) -> Normed:
    """The sum in the dtype of ``states``, and the layer norm of it and ``offset``; computed in float32.

    Args:
        states: (..., D), contiguous, as is ``added``.
        added: None: nothing is.
        offset: (D,) float32, contiguous; None: there is none.
        keeps_sum: False: the sum is not written, and rounded to no dtype; ``states`` takes its place.
        also: a second dtype to give the norm in; None: no other.
        sizes: of the kernel's programs; None: those of :meth:`NormSizes.of`.
    """
    width = states.shape[-1]
    keeps = added is not None and keeps_sum
    summed = torch.empty_like(states) if keeps else states
    normed = torch.empty_like(states, dtype=how.dtype)
    rounded = normed if also in (None, how.dtype) else torch.empty_like(states, dtype=also)
    weight, bias = how.scale or (states, states)  # never read then, nor is what else is not there
    if num_rows := states.numel() // width:
        block = triton.next_power_of_2(width)
        sizes = sizes or NormSizes.of(block)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
            _norm[(triton.cdiv(num_rows, sizes.rows),)](
                states,
                states if added is None else added,
                states if offset is None else offset,
                weight,
                bias,
                summed,
                normed,
                rounded,
                num_rows,
                width,
                how.eps,
                adds=added is not None,
                keeps=keeps,
                shifts=offset is not None,
                scales=how.scale is not None,
                rounds=rounded is not normed,
                rows=sizes.rows,
                block=block,
                num_warps=sizes.num_warps,
            )
    return Normed(summed, normed, rounded)
