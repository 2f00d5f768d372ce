"""Stores that let a second writer of one file overwrite it get no commits: rows would be lost without a word.

Nor do those that allow no writes: both are told before models are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, references
from tests.faulty_proxy import FaultyProxy, running_proxy
from tests.pictures import write_pictures
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.checks import _catalog
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine import remoderate, run
from vlmflow.errors import StorageAccessError

STORES = [("overwrites", "accepts a second writer of one file"), ("unknown", "knows no conditional writes")]


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with running_proxy(s3_server.endpoint, 0.0) as running:
        yield running


@pytest.fixture
def config(s3_server: S3Server, proxy: FaultyProxy) -> CatalogConfig:
    storage = s3_server.storage.model_copy(update={"endpoint": proxy.endpoint})
    return CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=storage)


def bucket_of(config: CatalogConfig) -> str:
    return config.uri.split("/")[2]


@pytest.mark.parametrize(("how", "said"), STORES)
def test_no_catalog_is_made_there(config: CatalogConfig, proxy: FaultyProxy, how: str, said: str) -> None:
    proxy.fail(bucket_of(config), how)
    with pytest.raises(StorageAccessError, match=rf"^s3://\S+ {said}, so two runs could .* lose rows$") as caught:
        Catalog.open_or_create(config, pa.schema([]))
    assert "If-None-Match" in caught.value.remedy
    assert not Catalog.exists(config)


@pytest.mark.parametrize(("how", "said"), STORES)
def test_nothing_is_committed_to_one_that_is_there(
    config: CatalogConfig, proxy: FaultyProxy, how: str, said: str
) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    proxy.fail(bucket_of(config), how)
    catalog = Catalog.open(config)
    with pytest.raises(StorageAccessError, match=said):
        enrich(catalog, "r2", [references(["b"])])
    assert Catalog.open(config).images(["uri"]).num_rows == 1


@pytest.mark.parametrize(("how", "said"), [*STORES, ("readonly", r"/catalog cannot be written: access denied$")])
def test_a_run_is_refused_before_it_starts_ray_and_loads_models(
    config: CatalogConfig,
    proxy: FaultyProxy,
    make_job: Callable[..., Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    said: str,
) -> None:
    for module in (run, remoderate):
        monkeypatch.setattr(module, "ray_cluster", lambda _: pytest.fail("Ray was started"))
    write_pictures(tmp_path / "photos", 1)
    job = make_job(tmp_path / "photos", catalog=config, tasks=("embed", "moderate"), pools=())
    proxy.fail(bucket_of(config), how)
    with pytest.raises(StorageAccessError, match=said):
        run.enrich(job)
    assert not Catalog.exists(config)
    proxy.fail(bucket_of(config), "")
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    proxy.fail(bucket_of(config), how)
    for refused in (run.enrich, remoderate.remoderate):
        with pytest.raises(StorageAccessError, match=said):
            refused(job)


def test_a_folder_that_cannot_be_written_is_refused_as_early_and_planned_for_all_the_same(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ray_cluster", lambda _: pytest.fail("Ray was started"))
    write_pictures(tmp_path / "photos", 1)
    # Where root cannot make a file either.
    job = make_job(tmp_path / "photos", catalog={"uri": "/proc/vlmflow-catalog"}, tasks=("embed",), pools=())
    assert run.plan(job).num_planned == 1
    with pytest.raises(StorageAccessError, match=r"^/proc/vlmflow-catalog cannot be written: /proc: "):
        run.enrich(job)


@pytest.mark.parametrize("how", ["", "races", *(how for how, _ in STORES)])
def test_doctor_says_so(config: CatalogConfig, proxy: FaultyProxy, how: str) -> None:
    proxy.fail(bucket_of(config), how)
    verdicts = {check.name: check.verdict for check in _catalog(config.uri, config.storage)}
    writes = "fail" if how else "ok"
    if how == "unknown":  # its first file is written so, too
        assert verdicts == {f"catalog {config.uri}": "fail"}
    else:
        assert verdicts == {f"catalog {config.uri}": "ok", "conditional writes": writes, "listings": "ok"}


def test_doctor_leaves_nothing(config: CatalogConfig, s3_server: S3Server) -> None:
    assert {check.verdict for check in _catalog(config.uri, config.storage)} == {"ok"}
    assert list(Folder(config).list("")) == []
