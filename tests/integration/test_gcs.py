"""Sources and catalogs in buckets of Google's kind, on a stand-in over HTTP; tests/gcs.py says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, image_id, references
from tests.gcs import PUBLIC, READER, TOKEN, GcsServer, running_gcs_server
from tests.processes import ROOT
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import to_binary
from vlmflow.checks import _catalog
from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.errors import ConfigError, StorageAccessError
from vlmflow.sources import open_source


@pytest.fixture(scope="module")
def _running(s3_server: S3Server) -> Iterator[GcsServer]:
    with running_gcs_server(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def server(_running: GcsServer, monkeypatch: pytest.MonkeyPatch) -> GcsServer:
    """A machine of Google's, whose account may do everything."""
    for name, value in _running.environment.items():
        monkeypatch.setenv(name, value)
    _running.grant(TOKEN)
    return _running


@pytest.fixture
def config(server: GcsServer, s3_server: S3Server) -> CatalogConfig:
    return CatalogConfig(uri=f"gs://{s3_server.make_bucket()}/catalog", storage=server.storage)


def told(config: CatalogConfig) -> list[str]:
    return [f"{check.verdict} {check.found}" for check in _catalog(config.uri, config.storage)]


def uris(catalog: Catalog) -> list[str]:
    return sorted(catalog.images(["uri"])["uri"].to_pylist())


def listed(uri: str, server: GcsServer, **storage: Any) -> list[str]:
    config = server.storage.model_copy(update=storage)
    found = open_source(SourceConfig(uri=uri, storage=config)).list()
    return [uri for batch in found for uri in batch["uri"].to_pylist()]


def test_of_two_who_commit_one_image_one_does_and_what_is_erased_is_gone(
    config: CatalogConfig, server: GcsServer
) -> None:
    first = Catalog.open_or_create(config, pa.schema([]))
    second = Catalog.open(config)
    enrich(first, "r1", [references(["a", "b"])])
    enrich(second, "r2", [references(["b", "c"])])
    assert uris(Catalog.open(config)) == ["mem://a", "mem://b", "mem://c"]
    assert first.erase(to_binary(pa.array([image_id("a")]))).num_rows == 1
    Catalog.open(config).compact("r3")
    Catalog.open(config).vacuum()
    assert uris(Catalog.open(config)) == ["mem://b", "mem://c"]
    assert server.num_refused() == 0


def test_doctor_finds_nothing_amiss(config: CatalogConfig) -> None:
    assert [line.split()[0] for line in told(config)] == ["ok", "ok", "ok"]


def test_a_bucket_that_is_absent_is_named(server: GcsServer) -> None:
    absent = CatalogConfig(uri="gs://nowhere/catalog", storage=server.storage)
    with pytest.raises(StorageAccessError, match=r"^gs://nowhere does not exist$"):
        Catalog.open_or_create(absent, pa.schema([]))
    with pytest.raises(StorageAccessError, match=r"^gs://nowhere does not exist$"):
        listed("gs://nowhere/photos", server)


@pytest.mark.parametrize(
    ("token", "said"), [("ya29.revoked", "refused the credentials"), ("", "no credentials were found")]
)
def test_who_may_not_is_told_so_and_no_token_is_repeated(
    config: CatalogConfig, server: GcsServer, token: str, said: str
) -> None:
    server.grant(token)
    with pytest.raises(StorageAccessError, match=f"{said}$") as caught:
        Catalog.open_or_create(config, pa.schema([]))
    with pytest.raises(StorageAccessError, match=f"{said}$"):
        listed(config.uri, server)
    lines = told(config)
    assert lines[0].startswith("fail")
    assert "ya29" not in f"{caught.value} {caught.value.remedy} {lines}"


def test_who_may_only_read_reads(config: CatalogConfig, server: GcsServer) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    server.grant(READER)
    catalog = Catalog.open(config)
    with pytest.raises(StorageAccessError, match=r"refused the credentials$"):
        enrich(catalog, "r2", [references(["b"])])
    assert uris(Catalog.open(config)) == ["mem://a"]
    assert told(config)[0].startswith("fail")


def test_a_public_bucket_is_read_without_an_account(server: GcsServer, s3_server: S3Server) -> None:
    bucket = f"{PUBLIC}-photos"
    s3_server.client.create_bucket(Bucket=bucket)
    for name in ("a b.jpg", "ä%20#?.jpg"):
        s3_server.put(bucket, f"photos/{name}", b"\xff\xd8")
    server.grant("")
    assert sorted(listed(f"gs://{bucket}/photos", server, anonymous=True)) == [
        f"gs://{bucket}/photos/a b.jpg",
        f"gs://{bucket}/photos/ä%20#?.jpg",
    ]


ONE_LINE = "-----BEGIN PRIVATE KEY----- MIIEvQIBADANBgkqhkiG9w0BAQEFAASC -----END PRIVATE KEY-----"
NO_KEY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize("private_key", [ONE_LINE, NO_KEY, "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"])
@pytest.mark.parametrize("name", ["GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"])
def test_a_key_that_cannot_be_read_is_not_repeated(
    config: CatalogConfig, name: str, private_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = {"type": "service_account", "client_email": "a@b", "private_key_id": "1", "private_key": private_key}
    (tmp_path / "key.json").write_text(json.dumps(account), encoding="utf-8")
    monkeypatch.setenv(name, json.dumps(account) if name.endswith("KEY") else str(tmp_path / "key.json"))
    with pytest.raises(ConfigError, match=r"the private key of the service account cannot be read$") as caught:
        Catalog.open_or_create(config, pa.schema([]))
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caught.value.remedy
    said = "".join(traceback.format_exception(caught.value)) + str(told(config))  # as logs of flows have it
    assert "MIIE" not in said
    assert str(list(b"MIIE")).strip("[]") not in said


@pytest.mark.slow
def test_a_job_from_a_bucket_to_a_bucket_and_nothing_is_due_then(server: GcsServer, s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    pictures = sorted((ROOT / "vlmflow/starter/demo").glob("sku-*.jpg"))[:24]
    for path in pictures:
        s3_server.put(bucket, f"photos/{path.name}", path.read_bytes())
    command = [sys.executable, "-m", "vlmflow", "enrich", f"gs://{bucket}/photos", f"gs://{bucket}/catalog"]
    command += ["--profile", "starter", "--tasks", "embed", "--endpoint", f"http://{server.address}", "--json"]
    for added, unchanged in ((24, 0), (0, 24)):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert (report["num_added"], report["num_unchanged"]) == (added, unchanged)
        assert TOKEN not in done.stdout + done.stderr
    assert server.num_refused() == 0
