"""What `doctor` says of a GPU, which is not there."""

from __future__ import annotations

import pytest
import torch

from vlmflow import checks
from vlmflow.models import fused


@pytest.mark.parametrize("reason", [None, "RuntimeError: Failed to find C compiler."])
def test_a_gpu_wants_a_compiler_for_its_kernels(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fused, "why_not", lambda: reason)
    _, gpu, triton = checks._torch()
    assert (gpu.verdict, gpu.found) == ("ok", "2 x NVIDIA H100, bf16")
    assert (triton.verdict, triton.found) == (("ok", "works") if reason is None else ("warn", reason))
    assert ("gcc" in triton.remedy) == (reason is not None)


def test_a_gpu_without_memory_is_told_of_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(fused, "why_not", full)
    check = checks._triton()
    assert (check.verdict, check.found) == ("fail", "CUDA out of memory. Tried to allocate 2.00 MiB.")
