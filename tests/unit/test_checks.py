"""What `doctor` says of a GPU, which is not there, of stores that fail, and of what may be there again in a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pyarrow as pa
import pytest
import ray
import torch
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError

from vlmflow import checks
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, RayConfig, StorageConfig
from vlmflow.engine import room
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.growth import NodeGroup
from vlmflow.errors import ClusterError, ConfigError, SourceError, StorageAccessError, TransientError, VlmflowError
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


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (AlreadyExistsError("it exists"), ["ok can be written", "ok a second writer of one file is refused"]),
        (None, ["ok can be written", "fail a second writer of one file is accepted"]),
        (
            GenericError("not implemented\nhere"),
            ["ok can be written", "fail whether there is a file already is not told"],
        ),
    ],
)
def test_nothing_is_left_in_the_catalog_whatever_the_second_write_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, found: list[str]
) -> None:
    put = obstore.put

    def second(store: Any, path: str, data: bytes, **options: Any) -> None:
        if data == b"again":
            if error is not None:
                raise error
            return
        put(store, path, data, **options)

    monkeypatch.setattr(obstore, "put", second)
    *told, listings = [f"{check.verdict} {check.found}" for check in checks._catalog(str(tmp_path), StorageConfig())]
    assert listings == "ok begin where they are told to"
    assert len(told) == len(found)
    assert all(one.startswith(start) for one, start in zip(told, found, strict=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_store_whose_listings_begin_elsewhere_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    names = obstore.list

    def listed(store: Any, prefix: str, offset: str) -> list[list[Any]]:
        return [[meta for meta in page if kept] for page in names(store, prefix=prefix)]

    monkeypatch.setattr(obstore, "list", listed)
    *_, listings = checks._catalog(str(tmp_path), StorageConfig())
    assert (listings.name, listings.verdict) == ("listings", "fail")
    assert "commits after the first fail" in listings.found


def test_no_folder_is_left_of_a_catalog_that_is_none_yet(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("new", "deep/new", "there"):
        told = [check.verdict for check in checks._catalog(str(tmp_path / name), StorageConfig())]
        assert told == ["ok", "ok", "ok"]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_another_program_has_turned_on_in_a_table_is_told(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))

    def tables() -> checks.Check:
        return checks._guarded("tables", lambda: checks._tables(config))

    assert tables().verdict == "ok", "there are none"
    log = Catalog.open_or_create(config, pa.schema([]))._images
    assert tables().verdict == "ok"
    log.table.alter.set_table_properties({"delta.appendOnly": "true"})
    told = tables()
    assert (told.verdict, told.may_pass) == ("fail", False)
    assert "table images takes additions alone (delta.appendOnly)" in told.found
    assert "delta.appendOnly to false" in told.remedy


def test_a_catalog_in_which_nothing_can_be_deleted_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionDeniedError("no")

    monkeypatch.setattr(obstore, "delete", refuse)
    *others, last = checks._catalog(str(tmp_path), StorageConfig())
    assert {check.name: check.verdict for check in others} == {
        f"catalog {tmp_path}": "ok", "conditional writes": "ok", "listings": "ok"
    }  # fmt: skip
    assert last.verdict == "fail"
    assert "cannot be deleted: no" in last.found


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


def test_what_a_cluster_may_grow_to_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (NodeGroup(8.0, 1.0, 1.0, 4),)
    for grows, told in (((), ""), (groups, "; may grow to 32 CPUs, 4 GPUs")):
        found = Cluster(cpus=2.0, gpus=0.0, num_nodes=1, embedded=False, groups=grows)
        monkeypatch.setattr(checks, "ray_cluster", lambda _, found=found: nullcontext(found))
        assert next(checks._ray(RayConfig(), ())).found == f"1 node(s), 2 CPUs, 0 GPUs{told}"


def test_runs_that_are_on_a_cluster_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(cpus=2.0, gpus=0.0, num_nodes=1, embedded=False)
    monkeypatch.setattr(checks, "ray_cluster", lambda _: nullcontext(cluster))
    states = ("has", "waits", *("has",) * 5)
    runs = [room.Entry(f"run-{at}", "c", "01000000", at, (), state) for at, state in enumerate(states)]
    monkeypatch.setattr(room, "runs_there", lambda: runs)
    found = list(islice(checks._ray(RayConfig(), ()), 2))[1]
    told = "at work: run-0 of c, run-1 of c (waits for room), run-2 of c, run-3 of c, run-4 of c, and 2 more"
    assert (found.name, found.verdict, found.found) == ("ray runs", "ok", told)


class Probe:
    """A function of Ray's that runs at once, here."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function

    def options(self, **_: Any) -> Probe:
        return self


@pytest.mark.parametrize(("shared_bytes", "warned"), [(64e6, True), (4e9, False)])
def test_nodes_whose_images_go_through_a_disk_are_told(
    shared_bytes: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"CPU": 2.0, "object_store_memory": 2e9}
    node = {"Alive": True, "NodeID": "a" * 56, "NodeManagerAddress": "10.0.0.7", "Resources": resources}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "remote", lambda **_: Probe)
    monkeypatch.setattr(ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(total=shared_bytes))
    versions, *shared = checks._workers(())
    assert versions.verdict == "ok"
    assert [(check.verdict, check.found.rpartition(": ")[2]) for check in shared] == [("warn", "10.0.0.7")] * warned
    assert all("/dev/shm" in check.remedy for check in shared)


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
