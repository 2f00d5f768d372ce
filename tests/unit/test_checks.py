"""What `doctor` says of a GPU, which is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmflow import checks
from vlmflow.models import fused
from vlmflow.models.pixels import model_dtype


@pytest.mark.parametrize("reason", [None, "RuntimeError: Failed to find C compiler."])
def test_a_gpu_wants_a_compiler_for_its_kernels(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fused, "why_not", lambda: reason)
    _, gpu, triton = checks._torch()
    assert (gpu.verdict, gpu.found) == ("ok", "2 x NVIDIA H100, bf16")
    assert (triton.verdict, triton.found) == (("ok", "works") if reason is None else ("warn", reason))
    assert ("gcc" in triton.remedy) == (reason is not None)


def test_bf16_that_is_emulated_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = SimpleNamespace(major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: turing)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # as CUDA emulates it
    monkeypatch.setattr(fused, "why_not", lambda: None)
    gpu = list(checks._torch())[1]
    assert (gpu.verdict, gpu.found) == ("warn", "Tesla T4 without bf16")
    assert model_dtype("cuda") == torch.float32
    assert model_dtype("cuda", "bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    turing.major = 8
    assert next(check for check in checks._torch() if check.name == "gpu").verdict == "ok"
    assert model_dtype("cuda:0") == torch.bfloat16


def test_a_gpu_without_memory_is_told_of_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(fused, "why_not", full)
    check = checks._triton()
    assert (check.verdict, check.found) == ("fail", "CUDA out of memory. Tried to allocate 2.00 MiB.")
