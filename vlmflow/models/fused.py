"""Our kernels in Triton, where they can be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vlmflow.device_errors import is_device_broken, is_out_of_memory

logger = logging.getLogger("vlmflow")

_unfit: set[str] = set()  # names of the kernels that this GPU cannot run


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether the tensors lie on CUDA as the kernels read them, and Triton works there."""
    # Fake tensors, of another type, have no memory to give to a kernel.
    return all(type(x) is torch.Tensor and x.is_cuda and x.is_contiguous() for x in tensors) and why_not() is None


def attempt(kernel: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor | None:
    """What a kernel gives; None where this GPU cannot run it, of which the log tells once.

    One of :func:`can_fuse`'s tensors may still ask for more shared memory or registers than a small GPU has.

    Raises:
        RuntimeError: there is no memory left, or the device is broken.
    """
    if kernel.__name__ in _unfit:
        return None
    try:
        return kernel(*given)
    except Exception as error:  # as in `why_not`
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        _unfit.add(kernel.__name__)
        logger.warning("a kernel cannot run here, and models run slower without: %s: %s", kernel.__name__, _said(error))
        return None


@cache
def why_not() -> str | None:
    """Why Triton cannot be used on this machine's GPU, which is told once in the log; None: it can.

    It needs a C compiler, Python's headers, and a folder to write to.

    Raises:
        RuntimeError: there is no memory left for it, or the device is broken; neither says anything of Triton.
    """
    try:
        _try()
    except Exception as error:  # Triton's, the compiler's, the system's: all mean the same here
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        reason = _said(error)
        logger.warning("Triton does not work here, and models run slower without (`vlmflow doctor`): %s", reason)
        return reason
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _try() -> None:
    from vlmflow.models.triton_norm import NormOf, norm

    x = torch.ones((2, 8), device="cuda")
    norm(NormOf(None, 1e-5, torch.float32), x, x)
    torch.cuda.current_stream().synchronize()
