"""Other readers on the tables, the export, and compaction."""

from __future__ import annotations

import datetime as dt
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import duckdb
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import DATE, enrich, open_catalog, references, request, rows_by_name, write
from tests.s3 import S3Server
from vlmflow.catalog import Catalog, compact
from vlmflow.catalog.compact import CompactResult
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError

NAMES = [f"image {number}" for number in range(9)]
NEXT_DAY = DATE + dt.timedelta(days=1)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Nine images of two days; three of them replaced, one with new bytes; old files beside the live ones."""
    catalog = open_catalog(tmp_path / "catalog", pa.schema([("title", pa.string())]))
    titles = [{"title": f"title of {name}"} for name in NAMES]
    enrich(catalog, "r1", [references(NAMES[:5], source=titles[:5])])
    enrich(catalog, "r2", [references(NAMES[5:], source=titles[5:])], request(date=NEXT_DAY))
    changed = references(NAMES[3:6], version="v2", source=titles[3:6])
    enrich(catalog, "r3", [changed], content="new", caption="a dog", decision="block")
    return catalog


def days_ago(count: int) -> dt.date:
    return dt.datetime.now(dt.UTC).date() - dt.timedelta(days=count)


def expected(catalog: Catalog) -> set[tuple[str, str, str, dt.date, str]]:
    rows = rows_by_name(catalog)
    assert sorted(rows) == sorted(NAMES)
    return {
        (row["uri"], row["caption"], row["decision"], row["ingest_date"], row["source"]["title"])
        for row in rows.values()
    }


def test_duckdb_polars_and_pyarrow_read_the_live_rows(catalog: Catalog) -> None:
    want = expected(catalog)
    files = catalog.file_uris("images")
    assert len(list(Path(catalog.uri, "images").rglob("*.parquet"))) > len(files)
    query = "select uri, caption, decision, ingest_date, source.title from read_parquet($files, hive_partitioning=true)"
    assert set(duckdb.execute(query, {"files": files}).fetchall()) == want
    frame = polars.read_delta(str(Path(catalog.uri, "images")))
    title = polars.col("source").struct.field("title")
    assert set(frame.select("uri", "caption", "decision", "ingest_date", title).rows()) == want
    partition = ds.partitioning(pa.schema([("ingest_date", pa.date32())]), flavor="hive")
    table = ds.dataset(files, partitioning=partition, partition_base_dir=str(Path(catalog.uri, "images"))).to_table()
    rows = table.select(["uri", "caption", "decision", "ingest_date", "source"]).to_pylist()
    assert {(*list(row.values())[:4], row["source"]["title"]) for row in rows} == want


def test_a_catalog_may_lie_anywhere(catalog: Catalog, tmp_path: Path) -> None:
    want = expected(catalog)
    moved = Path(catalog.uri).rename(tmp_path / "für #1, 100 % neu")
    files = open_catalog(moved).file_uris("images")
    assert all(Path(file).is_file() for file in files)
    query = "select uri, caption, decision, ingest_date, source.title from read_parquet($files, hive_partitioning=true)"
    assert set(duckdb.execute(query, {"files": files}).fetchall()) == want
    assert ds.dataset(files).count_rows() == polars.read_parquet(files, glob=False).height == len(want)
    frame = polars.read_delta(str(moved / "images"), use_pyarrow=True)  # as README says
    title = polars.col("source").struct.field("title")
    assert set(frame.select("uri", "caption", "decision", "ingest_date", title).rows()) == want


@pytest.mark.slow
def test_a_catalog_in_a_bucket_may_lie_anywhere(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    config = CatalogConfig(uri=f"s3://{bucket}/some where/für #1", storage=s3_server.storage)
    catalog = Catalog.open_or_create(config, pa.schema([]))
    enrich(catalog, "r1", [references(["a"])])
    (file,) = catalog.file_uris("images")
    name = file.removeprefix(f"s3://{bucket}/")
    assert name.startswith("some where/für #1/images/")
    assert s3_server.client.head_object(Bucket=bucket, Key=name)["ContentLength"] > 0


def test_only_vectors_of_current_rows_are_read(catalog: Catalog) -> None:
    vectors = catalog.embeddings()
    current = dict(zip(*catalog.images(["image_id", "embed_run_id"]).to_pydict().values(), strict=True))
    found = vectors.select(["image_id", "embed_run_id", "view"]).to_pylist()
    assert len(found) == 2 * len(NAMES)
    assert {(row["image_id"], row["embed_run_id"]) for row in found} == set(current.items())
    assert vectors.schema.field("vector").type == pa.list_(pa.float32())
    assert {tuple(vector) for vector in vectors["vector"].to_pylist()} == {(1, 0, 0, 0), (0, 1, 0, 0)}


def test_an_export_is_plain_parquet(catalog: Catalog, tmp_path: Path) -> None:
    want = expected(catalog)
    result = catalog.export(tmp_path / "out", with_embeddings=True)
    assert (result.num_images, result.num_embeddings) == (len(NAMES), 2 * len(NAMES))
    query = f"select uri, caption, decision, ingest_date, source.title from '{tmp_path}/out/images/*.parquet'"
    assert set(duckdb.sql(query).fetchall()) == want
    images = pq.read_table(tmp_path / "out" / "images")
    vectors = pq.read_table(tmp_path / "out" / "embeddings")
    assert images.schema.field("ingest_date").type == pa.date32()
    group = pq.ParquetFile(next((tmp_path / "out" / "embeddings").iterdir())).metadata.row_group(0)
    in_dictionary = {
        column.path_in_schema for column in map(group.column, range(group.num_columns)) if column.has_dictionary_page
    }
    assert {"image_id", "view"} <= in_dictionary
    assert "vector.list.element" not in in_dictionary
    keys = ["image_id", "embed_run_id"]
    joined = vectors.select([*keys, "view"]).join(images.select(keys), keys, join_type="inner")
    assert joined.num_rows == vectors.num_rows
    assert images.sort_by("uri").equals(catalog.images().sort_by("uri"))


def test_an_export_without_embeddings_and_of_an_empty_catalog(catalog: Catalog, tmp_path: Path) -> None:
    catalog.export(tmp_path / "out", with_embeddings=False)
    assert not (tmp_path / "out" / "embeddings").exists()
    empty = open_catalog(tmp_path / "empty catalog")
    result = empty.export(tmp_path / "empty", with_embeddings=True)
    assert (result.num_images, result.num_embeddings) == (0, 0)
    assert pq.read_table(tmp_path / "empty" / "images").schema.names == empty.images().schema.names
    assert pq.read_table(tmp_path / "empty" / "embeddings").num_rows == 0


def test_an_export_never_mixes_with_what_is_there(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CatalogError, match="out is not empty"):
        catalog.export(tmp_path / "out", with_embeddings=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CatalogError, match="cannot be written"):
        catalog.export(tmp_path / "file", with_embeddings=False)


def test_an_export_appears_when_it_is_whole(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "out", pq.write_table
    seen: list[list[str]] = []

    def watched(*given: object, **options: object) -> None:
        seen.append([path.name for path in out.iterdir()])
        if len(seen) == 2:  # images are written, and of the embeddings nothing
            raise KeyboardInterrupt
        original(*given, **options)

    monkeypatch.setattr(pq, "write_table", watched)
    with pytest.raises(KeyboardInterrupt):
        catalog.export(out, with_embeddings=True)
    assert seen == [[".unfinished"]] * 2
    assert list(out.iterdir()) == []
    catalog.export(out, with_embeddings=True)
    assert {path.name for path in out.iterdir()} == {"images", "embeddings"}
    with pytest.raises(CatalogError, match="out is not empty"):
        catalog.export(out, with_embeddings=True)


def test_an_export_starts_over_where_one_was_killed(catalog: Catalog, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in (".unfinished/images", "embeddings"):  # killed between its two last steps
        (out / folder).mkdir(parents=True)
        (out / folder / "part-00000.parquet").write_bytes(b"half")
    lock = os.open(out / ".unfinished", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CatalogError, match="another export is writing to"):
        catalog.export(out, with_embeddings=False)
    os.close(lock)
    assert catalog.export(out, with_embeddings=False).num_images == len(NAMES)
    assert [path.name for path in out.iterdir()] == ["images"]
    assert pq.read_table(out / "images").num_rows == len(NAMES)


def test_compaction_joins_files_and_keeps_every_row(catalog: Catalog) -> None:
    rows, vectors = catalog.images().sort_by("uri"), catalog.embeddings().sort_by("image_id")
    for number in range(3):
        enrich(catalog, f"more-{number}", [references([f"more {number}"])])
    result = catalog.compact("c1")
    assert result.num_files_after < result.num_files_before
    assert len(catalog.file_uris("images")) == 2  # one for each date
    after = catalog.images().sort_by("uri")
    assert after.filter(pc.is_in(after["uri"], rows["uri"])).equals(rows)
    assert catalog.embeddings().num_rows == vectors.num_rows + 6
    version = catalog.version
    assert catalog.compact("c2").num_files_before == 0
    assert catalog.version == version


def test_compaction_drops_vectors_only_of_runs_that_are_over(catalog: Catalog) -> None:
    """Those of r1 that r3 has replaced go; those of a live run stay, though nothing refers to them yet."""
    for run in ("r1", "r2", "r3"):
        catalog.runs.start(run, {})
        catalog.runs.finish(run, {})
    catalog.runs.start("live", {})
    asked = request(date=DATE)
    uncommitted = write(catalog, "live", [references(["later"])], asked)
    catalog.commit("live", uncommitted.filter(pc.equal(uncommitted["table"], "embeddings")))
    before = catalog.embeddings().sort_by([("image_id", "ascending"), ("view", "ascending")])
    assert catalog.compact("c1").num_embeddings_dropped == 6
    assert catalog.embeddings().sort_by([("image_id", "ascending"), ("view", "ascending")]).equals(before)
    catalog.commit("live", uncommitted.filter(pc.equal(uncommitted["table"], "images")))
    assert catalog.embeddings().num_rows == before.num_rows + 2


def test_large_files_are_left_alone(catalog: Catalog) -> None:
    files = catalog.file_uris("images")
    assert catalog.compact("c1", target_bytes={"images": 1000, "embeddings": 1000}).num_files_before == 0
    assert catalog.file_uris("images") == files


def test_compaction_with_nothing_to_do_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_catalog(tmp_path / "dates")
    for day in range(1, 4):
        enrich(catalog, f"r{day}", [references([f"n{day}"])], request(date=days_ago(day)))
    read: list[str] = []
    monkeypatch.setattr(Folder, "read_parquet", lambda folder, path, columns=None: read.append(path))
    assert catalog.compact("c1") == CompactResult()
    assert read == []


def test_large_files_are_written_anew_where_the_run_has_replaced_much(tmp_path: Path) -> None:
    catalog, names = open_catalog(tmp_path / "large"), [f"n{number}" for number in range(200)]
    asked = request(date=days_ago(1))
    for run, some, version in (("r1", names, "v1"), ("r2", names[:100], "v2")):
        catalog.runs.start(run, {})
        enrich(catalog, run, [references(some, version=version)], asked, content=version)
        catalog.runs.finish(run, {})
    large = 2 * max(file.size_bytes for file in catalog.live_files("embeddings").values())
    target = {"images": 1, "embeddings": large}
    assert catalog.compact("other", target_bytes=target) == CompactResult()
    # Half of the large file goes, which makes it small, and so it is joined with the new one.
    assert catalog.compact("r2", target_bytes=target) == CompactResult(3, 2, 200)
    assert catalog.embeddings().num_rows == 400


def test_a_large_file_goes_when_the_new_vectors_come_in_a_large_one_too(tmp_path: Path) -> None:
    catalog, names = open_catalog(tmp_path / "large"), [f"n{number}" for number in range(50)]
    for run, version in (("r1", "v1"), ("r2", "v2")):
        catalog.runs.start(run, {})
        enrich(catalog, run, [references(names, version=version)], request(date=days_ago(1)), content=version)
        catalog.runs.finish(run, {})
    all_large = {"images": 1, "embeddings": 1}
    assert catalog.compact("other", target_bytes=all_large) == CompactResult()
    assert catalog.compact("r2", target_bytes=all_large) == CompactResult(1, 0, 100)
    assert catalog.embeddings().num_rows == 100


def test_what_a_killed_run_left_on_another_date_goes_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = dt.datetime.combine(DATE + dt.timedelta(days=30), dt.time(), dt.UTC)
    clock = SimpleNamespace(now=lambda zone: now)
    monkeypatch.setattr(compact, "dt", SimpleNamespace(datetime=clock, UTC=dt.UTC))
    catalog = open_catalog(tmp_path / "killed")
    for run, date in (("r30", DATE), ("r29", NEXT_DAY)):
        catalog.runs.start(run, {})
        files = write(catalog, run, [references([run])], request(date=date))
        catalog.commit(run, files.filter(pc.equal(files["table"], "embeddings")))
        catalog.runs.finish(run, {})
    all_large = {"images": 1, "embeddings": 1}
    assert catalog.compact("c1", target_bytes=all_large) == CompactResult(1, 0, 2)
    assert [file.ingest_date for file in catalog.live_files("embeddings").values()] == [NEXT_DAY]
