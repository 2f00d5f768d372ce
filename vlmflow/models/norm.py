"""Layer norms, and the sums before them.

On CUDA memory is all that they cost: a sum and its norm are one pass there, by a kernel of ours in Triton. torch's
layer norm reaches half of the memory's speed on an H100 (1.4 of 3.0 TB/s), and the sum is a pass of its own.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

logger = logging.getLogger("vlmflow")

# The kernel holds a row in registers.
_MAX_WIDTH = 8192


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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        if _is_fused(x):
            return _kernel(x, None, self._scale, self._eps, self._dtype)[1]
        if x.dtype == self._dtype and (self._weight is None or self._weight.dtype == x.dtype):
            return nn.functional.layer_norm(x, self._shape, self._weight, self._bias, self._eps)
        weight, bias = self._scale or (None, None)
        return nn.functional.layer_norm(x.float(), self._shape, weight, bias, self._eps).to(self._dtype)

    def add(self, states: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., D) both -> their sum in the dtype of ``states``, and its norm."""
        if _is_fused(states, added):
            return _kernel(states, added, self._scale, self._eps, self._dtype)
        states = states + added
        return states, self(states)

    def of_sum(self, states: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """(..., D) both -> the norm of their sum."""
        if _is_fused(states, added):
            return _kernel(states, added, self._scale, self._eps, self._dtype, keeps_sum=False)[1]
        return self(states + added)


def _is_fused(*tensors: torch.Tensor) -> bool:
    # Fake tensors, of another type, have no memory to give to a kernel.
    if not all(type(x) is torch.Tensor and x.is_cuda and x.is_contiguous() for x in tensors):
        return False
    return tensors[0].shape[-1] <= _MAX_WIDTH and _works()


def _kernel(
    states: torch.Tensor,
    added: torch.Tensor | None,
    scale: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    *,
    keeps_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    from vlmflow.models.triton_norm import add_norm

    return add_norm(states, added, scale, eps, dtype, keeps_sum=keeps_sum)


@cache
def _works() -> bool:
    """Whether Triton is here, and what it needs: a compiler of C, and a folder to write to."""
    try:
        x = torch.ones((2, 8), device="cuda")
        _kernel(x, x, None, 1e-5, torch.float32)
        torch.cuda.current_stream().synchronize()
    except Exception as error:  # noqa: BLE001  Triton's, the compiler's, the system's: all mean the same here
        reason = " ".join(str(error).split())[:200]
        logger.warning(
            "sums and norms run as passes of their own, which takes a tenth longer: Triton does not work here, %s: %s",
            type(error).__name__,
            reason,
        )
        return False
    return True
