"""The same job on an S3-compatible server over HTTP, and the tables as other readers see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import polars
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from tests.pictures import write_broken, write_pictures
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.config import Job
from vlmflow.engine import enrich

pytestmark = pytest.mark.usefixtures("ray_session")

# What differs between stores and between runs: names, versions (ETag against time and size), times.
PLACE = (
    "image_id",
    "uri",
    "object_version",
    "seen_version",
    "run_id",
    "embed_run_id",
    "read_at",
    "updated_at",
    "ingest_date",  # midnight may lie between the two
    "attempt_digest",
)


def comparable(catalog: Catalog) -> list[dict[str, object]]:
    rows = catalog.images().to_pylist()
    named = sorted(rows, key=lambda row: str(row["uri"]).rsplit("/", 1)[-1])
    return [{name: value for name, value in row.items() if name not in PLACE} for row in named]


@pytest.fixture(scope="module")
def local(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Images in a folder, good and broken, and their catalog beside it, which tests only read."""
    place = tmp_path_factory.mktemp("local")
    folder = place / "images"
    write_pictures(folder, 9)
    write_broken(folder)
    (folder / "mit Leerzeichen und ü.png").write_bytes((folder / "picture 00001.png").read_bytes())
    job = make_job_in(place, folder)
    enrich(job)
    return job


def test_the_same_rows_from_a_bucket_as_from_a_folder(
    local: Job, make_job: Callable[..., Job], s3_server: S3Server
) -> None:
    bucket = s3_server.make_bucket()
    for path in Path(local.source.uri).iterdir():
        s3_server.client.put_object(Bucket=bucket, Key=f"images/{path.name}", Body=path.read_bytes())
    storage = {"endpoint": s3_server.endpoint}
    remote = make_job(
        f"s3://{bucket}/images",
        source_options={"storage": storage},
        catalog={"uri": f"s3://{bucket}/catalog", "storage": storage},
    )
    enrich(remote)

    there, here = Catalog.open(remote.catalog), Catalog.open(local.catalog)
    assert comparable(there) == comparable(here)
    assert len(comparable(here)) == 14
    assert sorted(there.embeddings()["vector"].to_pylist()) == sorted(here.embeddings()["vector"].to_pylist())
    assert enrich(remote).status == "nothing_due"


def test_other_readers_see_every_row_once(make_job: Callable[..., Job], tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "images", 6)
    job = make_job(tmp_path / "images")
    enrich(job)
    paths[0].write_bytes(paths[3].read_bytes())  # a replacement leaves an old file beside the live ones
    enrich(job)
    ours = Catalog.open(job.catalog).images(["uri", "caption", "decision"]).to_pylist()
    expected = {(row["uri"], row["caption"], row["decision"]) for row in ours}
    assert len(ours) == len(expected) == 6

    table = DeltaTable(str(tmp_path / "catalog" / "images"))
    files = table.file_uris()
    columns = "uri, caption, decision"
    assert len(list((tmp_path / "catalog" / "images").rglob("*.parquet"))) > len(files)
    by_duckdb = duckdb.sql(f"select {columns} from read_parquet({files!r}, hive_partitioning=true)").fetchall()
    by_polars = polars.read_delta(str(tmp_path / "catalog" / "images")).select("uri", "caption", "decision").rows()
    by_pyarrow = ds.dataset(files, format="parquet").to_table(columns=["uri", "caption", "decision"]).to_pylist()
    assert sorted(by_duckdb) == sorted(by_polars) == sorted(expected)
    assert {(row["uri"], row["caption"], row["decision"]) for row in by_pyarrow} == expected


def test_an_export_is_plain_parquet(local: Job, tmp_path: Path) -> None:
    catalog = Catalog.open(local.catalog)
    catalog.export(tmp_path / "out", with_embeddings=True)
    images = pq.read_table(tmp_path / "out" / "images")
    vectors = duckdb.sql(f"select * from '{tmp_path}/out/embeddings/*.parquet'").fetchall()
    assert images.num_rows == catalog.images().num_rows == 14
    assert images["ingest_date"].null_count == 0
    assert len(vectors) == catalog.embeddings().num_rows > 0
