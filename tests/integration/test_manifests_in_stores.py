"""Manifests of several files, and Delta tables, on an S3-compatible server over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.s3 import S3Server
from vlmflow.config import SourceConfig, StorageConfig
from vlmflow.delta_table import delta_storage_options
from vlmflow.errors import SourceError, StorageAccessError
from vlmflow.sources import open_source


def listed(config: SourceConfig) -> dict[str, Any]:
    return {row["uri"]: row.get("source") for batch in open_source(config).list() for row in batch.to_pylist()}


@pytest.mark.parametrize("prefix", ["lists/a b", "lists/products.parquet", "lists/products.parquet/"])
def test_a_prefix_of_files_is_one_manifest(prefix: str, s3_server: S3Server, tmp_path: Path) -> None:
    for number in range(20):  # more than are copied at a time
        table = pa.table({"uri": [f"image {number}.jpg"], "title": [f"title {number}"]})
        (tmp_path / f"n={number % 2}").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"n={number % 2}" / f"part-{number:02d}.parquet")
    bucket = s3_server.make_bucket()
    s3_server.upload(bucket, prefix.rstrip("/"), tmp_path)
    s3_server.put(bucket, f"{prefix.rstrip('/')}/_SUCCESS", b"")
    kind = "manifest" if " " in prefix else "auto"
    config = SourceConfig(uri=f"s3://{bucket}/{prefix}", kind=kind, storage=s3_server.storage)
    assert listed(config) == {
        f"s3://{bucket}/{prefix.rstrip('/')}/image {number}.jpg": {"title": f"title {number}", "n": str(number % 2)}
        for number in range(20)
    }


def test_a_file_that_is_not_there_is_missing_still(s3_server: S3Server) -> None:
    uri = f"s3://{s3_server.make_bucket()}/list.parquet"
    with pytest.raises(SourceError, match=r"list\.parquet does not exist"):
        listed(SourceConfig(uri=uri, storage=s3_server.storage))


def test_a_delta_table_in_a_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, storage = f"s3://{s3_server.make_bucket()}/lake/products", s3_server.storage
    options = delta_storage_options(storage, uri)
    for names in (["a.jpg", "b.jpg"], ["c.jpg"]):
        rows = pa.table({"uri": names, "price": [len(names)] * len(names), "image_id": names})
        write_deltalake(uri, rows, mode="append", storage_options=options)
    DeltaTable(uri, storage_options=options).delete("uri = 'b.jpg'")
    expected = {f"{uri}/a.jpg": {"price": 2, "image_id": "a.jpg"}, f"{uri}/c.jpg": {"price": 1, "image_id": "c.jpg"}}
    assert listed(SourceConfig(uri=uri, kind="manifest", storage=storage)) == expected
    with pytest.raises(SourceError, match="lake/products holds tables and no images"):
        listed(SourceConfig(uri=uri, storage=storage))
    none = StorageConfig(endpoint="http://127.0.0.1:1", max_retries=0)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(Exception, match=r"s3://.*out of reach") as caught:
        listed(SourceConfig(uri=uri, kind="manifest", storage=none))
    assert not isinstance(caught.value, StorageAccessError)
