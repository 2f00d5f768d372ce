"""Whether the kernels of :mod:`vlmflow.models.triton_kernels` can be used."""

from __future__ import annotations

import logging
from functools import cache

import torch

from vlmflow.device_errors import is_device_broken, is_out_of_memory

logger = logging.getLogger("vlmflow")


def can_fuse(*tensors: torch.Tensor) -> bool:
    """Whether the tensors lie on CUDA as the kernels read them, and Triton works there."""
    # Fake tensors, of another type, have no memory to give to a kernel.
    return all(type(x) is torch.Tensor and x.is_cuda and x.is_contiguous() for x in tensors) and why_not() is None


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
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning("Triton does not work here, and models run slower without (`vlmflow doctor`): %s", reason)
        return reason
    return None


def _try() -> None:
    from vlmflow.models.triton_kernels import NormOf, norm

    x = torch.ones((2, 8), device="cuda")
    norm(NormOf(None, 1e-5, torch.float32), x, x)
    torch.cuda.current_stream().synchronize()
