"""Layer norms, and the sums before them.

On CUDA memory is all that they cost: a sum and its norm are one pass there, by a kernel of ours. torch's layer norm
reaches half of the memory's speed on an H100 (1.4 of 3.0 TB/s), and the sum is a pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from vlmflow.models.fused import can_fuse

if TYPE_CHECKING:
    from vlmflow.models.triton_norm import Normed

# The kernel holds a row in registers.
_MAX_WIDTH = 8192


class Carried(NamedTuple):
    """What is carried on from a norm, (..., D) both: one tensor where the dtypes are the same.

    Attributes:
        states: for the sums behind it, in the norm's dtype.
        rounded: for products, in theirs.
    """

    states: torch.Tensor
    rounded: torch.Tensor


class Norm:
    """A layer norm, computed in float32 whatever the dtype of what it takes and gives."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype = torch.float32) -> None:
        """``dtype``: of what it gives.

        What is carried from layer to layer is better float32, since bfloat16 would round every sum; what goes into a
        product alone may have that product's dtype.
        """
        self._shape, self._eps, self._dtype = norm.normalized_shape, norm.eps, dtype
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None
        if norm.elementwise_affine:
            self._weight, self._bias = norm.weight.detach(), norm.bias.detach()
            self._scale = (self._weight.float(), self._bias.float())

    def __call__(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., D); ``offset``: (D,) float32, added before; None: there is none."""
        if self._is_fused(x):
            return self._kernel(x, offset=offset).normed
        if offset is not None:
            x = x + offset
        if x.dtype == self._dtype and (self._weight is None or self._weight.dtype == x.dtype):
            return nn.functional.layer_norm(x, self._shape, self._weight, self._bias, self._eps)
        weight, bias = self._scale or (None, None)
        return nn.functional.layer_norm(x.float(), self._shape, weight, bias, self._eps).to(self._dtype)

    def add(self, states: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., D) both -> their sum in the dtype of ``states``, and its norm."""
        if self._is_fused(states, added):
            found = self._kernel(states, added)
            return found.summed, found.normed
        states = states + added
        return states, self(states)

    def of_sum(self, states: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """(..., D) both -> the norm of their sum."""
        if self._is_fused(states, added):
            return self._kernel(states, added, keeps_sum=False).normed
        return self(states + added)

    def carried(self, states: torch.Tensor, added: torch.Tensor, dtype: torch.dtype) -> Carried:
        """(..., D) both -> the norm of their sum, for sums and for products in ``dtype``."""
        if self._is_fused(states, added):
            found = self._kernel(states, added, keeps_sum=False, also=dtype)
            return Carried(found.normed, found.rounded)
        normed = self(states + added)
        return Carried(normed, normed.to(dtype))

    def _is_fused(self, *tensors: torch.Tensor) -> bool:
        return self._shape[-1] <= _MAX_WIDTH and can_fuse(*tensors)

    def _kernel(
        self,
        states: torch.Tensor,
        added: torch.Tensor | None = None,
        *,
        offset: torch.Tensor | None = None,
        keeps_sum: bool = True,
        also: torch.dtype | None = None,
    ) -> Normed:
        from vlmflow.models.triton_norm import NormOf, norm

        how = NormOf(self._scale, self._eps, self._dtype)
        return norm(how, states, added, offset=offset, keeps_sum=keeps_sum, also=also)
