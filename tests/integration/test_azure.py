"""A catalog in a container of Azure's kind, on Azurite over HTTP; tests/azure.py says where that is looked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
import pytest

from tests.azure import AZURITE, KEY, AzureServer, running_azure_server, sas_token
from tests.catalog_samples import enrich, image_id, references
from tests.processes import ROOT
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import to_binary
from vlmflow.checks import _catalog
from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.errors import StorageAccessError
from vlmflow.sources import open_source

pytestmark = pytest.mark.skipif(AZURITE is None, reason="needs azurite-blob 3.37 (npm: azurite), or AZURITE_BLOB set")

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with running_azure_server(tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture
def config(server: AzureServer) -> CatalogConfig:
    return CatalogConfig(uri=f"az://{server.make_container()}/catalog", storage=server.storage)


def container_of(config: CatalogConfig) -> str:
    return config.uri.split("/")[2]


def run(*arguments: str) -> tuple[int, str, str]:
    """A command as a user gives it; exit code, standard output, standard error."""
    command = [sys.executable, "-m", "vlmflow", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_a_job_from_a_container_to_a_container_and_nothing_is_due_then(server: AzureServer) -> None:
    container = server.make_container()
    pictures = sorted((ROOT / "vlmflow/starter/demo").glob("sku-*.jpg"))[:NUM_IMAGES]
    server.upload(container, "photos", pictures)
    source, catalog = f"az://{container}/photos", f"az://{container}/catalog"
    options = ["--profile", "starter", "--tasks", "embed", "--endpoint", server.endpoint, "--json"]
    for added, unchanged in ((NUM_IMAGES, 0), (0, NUM_IMAGES)):
        code, out, errors = run("enrich", source, catalog, *options)
        assert code == 0, errors
        report = json.loads(out.splitlines()[-1])
        assert (report["num_added"], report["num_unchanged"]) == (added, unchanged)
        assert KEY not in out + errors
    uri = f"{source}/{pictures[0].name}"
    code, out, errors = run("erase", catalog, "--uri", uri, "--yes", "--endpoint", server.endpoint)
    assert code == 0, out + errors
    rows = Catalog.open(CatalogConfig(uri=catalog, storage=server.storage)).images(["uri", "status"]).to_pylist()
    assert {row["uri"] for row in rows} == {f"{source}/{path.name}" for path in pictures[1:]}
    assert {row["status"] for row in rows} == {"ok"}


def test_of_two_who_commit_one_image_one_does(config: CatalogConfig) -> None:
    first = Catalog.open_or_create(config, pa.schema([]))
    second = Catalog.open(config)
    enrich(first, "r1", [references(["a", "b"])])
    enrich(second, "r2", [references(["b", "c"])])
    uris = Catalog.open(config).images(["uri"])["uri"].to_pylist()
    assert sorted(uris) == ["mem://a", "mem://b", "mem://c"]
    assert first.erase(to_binary(pa.array([image_id("a")]))).num_rows == 1


def test_doctor_finds_nothing_amiss(config: CatalogConfig) -> None:
    assert [check.verdict for check in _catalog(config.uri, config.storage)] == ["ok", "ok", "ok"]


def test_the_other_ways_to_write_the_address(server: AzureServer, config: CatalogConfig) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    container = container_of(config)
    for root in (f"abfs://{container}", f"abfss://{container}@devstoreaccount1.dfs.core.windows.net"):
        catalog = Catalog.open(CatalogConfig(uri=f"{root}/catalog", storage=server.storage))
        assert catalog.images(["uri"]).num_rows == 1


def test_a_container_that_is_absent_is_named(server: AzureServer) -> None:
    absent = CatalogConfig(uri="az://nowhere/catalog", storage=server.storage)
    with pytest.raises(StorageAccessError, match=r"^az://nowhere does not exist$"):
        Catalog.open_or_create(absent, pa.schema([]))
    with pytest.raises(StorageAccessError, match=r"^az://nowhere does not exist$"):
        list(open_source(SourceConfig(uri="az://nowhere/photos", storage=server.storage), None).list())


def test_a_refused_key_is_not_repeated(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "c2VjcmV0IHRoYXQgbm9ib2R5IG1heSByZWFk"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    with pytest.raises(StorageAccessError, match=r"refused the credentials$") as caught:
        Catalog.open_or_create(config, pa.schema([]))
    told = _told(config)
    assert told[0].startswith("fail")
    assert wrong not in f"{caught.value} {caught.value.remedy} {told}"


@pytest.mark.parametrize(("permissions", "writes"), [("racwdl", True), ("rl", False)])
def test_a_token_for_one_container(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, permissions: str, writes: bool
) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    token = sas_token(container_of(config), permissions)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token)
    catalog = Catalog.open(config)
    if writes:
        enrich(catalog, "r2", [references(["b"])])
    else:
        with pytest.raises(StorageAccessError, match=r"refused the credentials$"):
            enrich(catalog, "r2", [references(["b"])])
    assert Catalog.open(config).images(["uri"]).num_rows == 1 + writes
    told = str(_told(config))
    assert ("fail" in told) == (not writes)
    assert token.rpartition("sig=")[2] not in told


def _told(config: CatalogConfig) -> list[str]:
    return [f"{check.verdict} {check.found}" for check in _catalog(config.uri, config.storage)]
