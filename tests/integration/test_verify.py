"""Verify: what a catalog lacks, has twice, or has lost is found; what is sound is called sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

from tests.catalog_samples import (
    enrich,
    fingerprints,
    image_id,
    open_catalog,
    references,
    request,
    write,
)
from tests.integration.test_vacuum import let_die, start
from tests.pictures import write_pictures
from tests.s3 import S3Server
from tests.terminal import run
from vlmflow.catalog import Catalog, Verification
from vlmflow.catalog.keys import to_binary
from vlmflow.config import CatalogConfig
from vlmflow.sources.uris import image_ids

NAMES = ["a", "b", "c"]


@pytest.fixture
def catalog(root: Path) -> Catalog:
    catalog = open_catalog(root)
    enrich(catalog, "r0", [references(NAMES)])
    return catalog


def verify(
    catalog: Catalog, listed: Sequence[pa.RecordBatch] | None = None, asked: dict[str, str] | None = None
) -> Verification:
    return catalog.verify(listed or [references(NAMES)], asked or fingerprints())


def counts(found: Verification) -> dict[str, int]:
    return {kind: finding.count for kind, finding in found.findings.items()}


def test_a_sound_catalog_is_called_sound(catalog: Catalog) -> None:
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    catalog.compact("r2")
    found = verify(catalog, [references(NAMES, version="v2")])
    assert (found.is_sound, found.findings, found.num_listed, found.num_rows) == (True, {}, 3, 3)


def test_images_without_a_row_and_rows_without_an_image(catalog: Catalog) -> None:
    found = verify(catalog, [references(["a", "b", "d", "d"])])
    assert counts(found) == {"missing": 1, "extra": 1}
    assert found.findings["missing"].examples == ["mem://d"]
    assert found.findings["extra"].examples == ["mem://c"]
    assert not found.is_sound


def test_a_row_of_another_version_is_stale(catalog: Catalog) -> None:
    found = verify(catalog, [references(NAMES, version={"a": "v1", "b": "v2", "c": None})])
    assert counts(found) == {"stale": 1}
    assert found.findings["stale"].examples == ["mem://b"]


def test_a_key_with_two_rows(catalog: Catalog, root: Path) -> None:
    rows = catalog.images()
    write_deltalake(str(root / "images"), rows.filter(pc.equal(rows["uri"], "mem://b")), mode="append")
    found = verify(Catalog.open(CatalogConfig(uri=str(root))))
    assert found.findings["duplicate"].count == 1
    assert found.findings["duplicate"].examples == ["mem://b"]


@pytest.mark.parametrize("table", ["images", "embeddings"])
def test_lost_files_are_named_and_the_rest_is_still_looked_at(catalog: Catalog, root: Path, table: str) -> None:
    enrich(catalog, "r1", [references(["d"])])
    (file,) = (root / table).rglob("r1-*.parquet")
    file.unlink()
    found = verify(catalog, [references([*NAMES, "d"], version={"a": "v2", "b": "v1", "c": "v1", "d": "v1"})])
    assert found.findings["lost_files"].examples == [file.relative_to(root).as_posix()]
    assert found.findings["stale"].examples == ["mem://a"]
    other = {"images": "missing", "embeddings": "lost_vectors"}[table]
    assert counts(found) == {"lost_files": 1, "stale": 1, other: 1}


def test_a_file_cut_short_is_lost(catalog: Catalog, root: Path) -> None:
    (file,) = (root / "images").rglob("r0-*.parquet")
    file.write_bytes(file.read_bytes()[:-10])
    assert "lost_files" in verify(catalog).findings


def test_rows_whose_vectors_are_not_there(catalog: Catalog) -> None:
    written = write(catalog, "r1", [references(["b"], version="v2")], content="other")
    catalog.commit("r1", written.filter(pc.equal(written["table"], "images")))
    found = verify(catalog, [references(NAMES, version={"a": "v1", "b": "v2", "c": "v1"})])
    assert counts(found) == {"lost_vectors": 1}, "the vectors of an earlier run do not count"
    assert found.findings["lost_vectors"].examples == [image_id("b")]


def test_leftovers_dead_runs_and_strangers_are_warnings(catalog: Catalog, root: Path) -> None:
    start(catalog, "dead", "live")
    write(catalog, "dead", [references(["d"])])
    write(catalog, "live", [references(["e"])])
    let_die(root, "dead")
    (root / "images" / "notes.txt").write_text("mine")
    found = verify(catalog)
    assert counts(found) == {"orphan_files": 2, "foreign_files": 1, "dead_runs": 1}
    assert found.is_sound


def test_old_fingerprints_by_task_and_rows_given_up(catalog: Catalog) -> None:
    for _ in range(3):
        enrich(catalog, "r1", [references(["hard"])], problem=("decode", "timed_out"))
    found = verify(catalog, [references([*NAMES, "hard"])], fingerprints(caption="caption-2"))
    assert counts(found) == {"given_up": 1, "old_fingerprint": 3}
    assert found.findings["old_fingerprint"].tasks == {"caption": 3}
    assert found.is_sound


def test_erased_images_are_not_missing(catalog: Catalog) -> None:
    catalog.erase(to_binary(pa.array([image_id("a")], pa.string())))
    found = verify(catalog)
    assert (found.is_sound, found.num_erased, found.num_listed, found.num_rows) == (True, 1, 2, 2)


def test_the_command_line(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_pictures(tmp_path / "photos", 3)
    catalog = open_catalog(root)
    assert run("verify", str(tmp_path / "photos"), str(root)) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 images in the source, 0 rows in the catalog" in shown
    assert "error: 3 images of the source without a row" in shown
    assert "remedy: vlmflow enrich" in shown

    uris = [str(path) for path in paths]
    batch = references(NAMES)
    columns = {
        "image_id": pa.array(image_ids(uris)),
        "uri": pa.array(uris),
        "object_version": pa.array([None] * 3, pa.string()),
    }
    for name, values in columns.items():
        batch = batch.set_column(batch.schema.get_field_index(name), name, values)
    enrich(catalog, "r0", [batch], request())
    catalog.runs.start("r9", {"fingerprints": {"caption": "caption-2"}})
    catalog.runs.finish("r9", {"fingerprints": {"caption": "caption-2"}})
    assert run("verify", str(tmp_path / "photos"), str(root), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"]["stale"]["count"] == 3
    assert found["findings"]["old_fingerprint"]["tasks"] == {"caption": 3}

    newest = {"fingerprints": {"caption": "caption-2", "depth": "depth-1"}}  # of a version with a task more
    catalog.runs.start("s0", newest)
    catalog.runs.finish("s0", newest)
    assert run("verify", str(tmp_path / "photos"), str(root), "--json") == 1
    assert json.loads(capsys.readouterr().out)["findings"] == found["findings"]


def test_on_a_store(s3_server: S3Server) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    catalog = Catalog.open_or_create(config, pa.schema([]))
    enrich(catalog, "r0", [references(NAMES)])
    assert verify(catalog).findings == {}
    bucket = config.uri.split("/")[2]
    key = next(f"catalog/images/{path}" for path in catalog.live_files("images"))
    s3_server.client.delete_object(Bucket=bucket, Key=key)
    assert counts(verify(catalog)) == {"lost_files": 1, "missing": 3}
