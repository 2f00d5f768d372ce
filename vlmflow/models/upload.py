"""What is given to a model, on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The values on the device, before which nothing is waited for.

    A copy to CUDA from memory that is not pinned ends behind all that its thread has queued, such as a vision tower:
    then the device has nothing to do until the host has come to what follows.
    """
    if torch.device(device).type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def numbers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """As int64 on the device, see :func:`to_device`; for an index too, since a list is copied and waited for."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)
