"""What `doctor` says of a GPU, which is not there, and of what may be there again in a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmflow import checks
from vlmflow.config import StorageConfig
from vlmflow.errors import ClusterError, ConfigError, SourceError, StorageAccessError, TransientError, VlmflowError
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


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (TransientError("s3://shop is throttling"), True),
        (ClusterError("Ray at head:6379 does not answer"), True),
        (SourceError("photos does not exist"), False),
        (StorageAccessError("s3://shop refused the credentials"), False),
        (ConfigError("unknown key"), False),
    ],
)
def test_a_failure_says_whether_it_may_pass(error: VlmflowError, may_pass: bool) -> None:
    def fail() -> checks.Check:
        raise error

    assert checks._guarded("source", fail) == checks.Check("source", "fail", str(error), "", may_pass)


def test_a_store_out_of_reach_may_pass_and_a_file_in_the_way_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    nobody = StorageConfig(endpoint="http://127.0.0.1:9", region="us-east-1", max_retries=0)
    (away,) = checks._catalog("s3://shop/catalog", nobody)
    assert (away.verdict, away.may_pass) == ("fail", True)
    (tmp_path / "file").touch()
    (in_the_way,) = checks._catalog(str(tmp_path / "file" / "catalog"), StorageConfig())
    assert (in_the_way.verdict, in_the_way.may_pass) == ("fail", False)
