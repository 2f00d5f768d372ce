"""What an error of the device means, and who lends memory back when there is none left.

torch raises one class, ``torch.AcceleratorError``, for everything that CUDA answers: with code 2 there was no memory
outside of torch's own allocator, from 900 to 908 something could not be captured into a graph, a few refuse a call and
leave the device as it was, and nearly all others leave one on which nothing works any more until the process has ended
(the codes of ``cudaError_t`` in CUDA's runtime API).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from vlmflow.errors import ModelMemoryError

_MEMORY_ALLOCATION = 2
_CAPTURE = range(900, 909)
# An invalid argument or configuration, a kernel that is not there or not for this GPU, too few registers or too little
# shared memory for it, what is not supported.
_REFUSED = (1, 9, 98, 209, 701, 801)
# As cuBLAS, cuDNN and Triton say it, through a RuntimeError of no class of its own. Handles that are "not initialized"
# are those for which no memory was left.
_NO_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDA out of memory",
    "Triton Error [CUDA]: out of memory",
)


class Releasing(Protocol):
    """Holds memory of the device that it can do without."""

    def release(self) -> None:
        """Lets go of it."""


# Held by who captures a graph: meanwhile torch's allocator gives no memory back, and fails an assertion if asked to.
capturing = threading.Lock()
_releasing: weakref.WeakSet[Releasing] = weakref.WeakSet()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once may do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError) and _code(error) is not None:
        return _code(error) == _MEMORY_ALLOCATION
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextmanager
def fitting(what: str, device: str) -> Iterator[None]:
    """Within the block something is loaded that may be too large for the device.

    Args:
        what: it is, such as ``the model of caption``.
        device: as torch names it.

    Raises:
        ModelMemoryError: it does not fit; the error says who has the memory, as far as that can be known.
    """
    try:
        yield
    except (RuntimeError, MemoryError, ModelMemoryError) as error:
        # What is loaded within something larger is told of as that.
        if not isinstance(error, ModelMemoryError) and not is_out_of_memory(error):
            raise
        raise ModelMemoryError(
            f"{what} does not fit in the memory of {_described(device)}",
            remedy=ModelMemoryError.REMEDY,
        ) from error


def _described(device: str) -> str:
    if torch.device(device).type != "cuda":
        return "this machine"
    try:
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        name = torch.cuda.get_device_name(device)
    except RuntimeError:  # there is not even room for what CUDA keeps of a process
        return "the GPU"
    own = f"{torch.cuda.memory_reserved(device) / 1e9:.1f}"
    allowed = f" of {share * total / 1e9:.1f} that it may take" if share < 1 else ""
    return f"{name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free, and this process has {own}{allowed}"


def is_device_broken(error: BaseException) -> bool:
    """Whether every later call on the device would fail as well: the process must end."""
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    return _code(error) not in (*_CAPTURE, *_REFUSED)


def release_on_demand(holder: Releasing) -> None:
    """Has ``holder`` let go of what it can do without whenever memory runs out, for as long as it lives."""
    _releasing.add(holder)


def release_memory() -> None:
    """Frees what is only kept to save time, once no graph is captured.

    To be called outside of handlers, whose tracebacks keep tensors.
    """
    for holder in list(_releasing):
        holder.release()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with capturing:
            torch.cuda.empty_cache()


def _code(error: torch.AcceleratorError) -> int | None:
    return getattr(error, "error_code", None)
