"""Images are read again as the job says: its http servers and its stores, wherever pictures of them are shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.images import encode, scene
from tests.report_samples import put_rows
from tests.site import Site, serving
from tests.terminal import run
from vlmflow import explain
from vlmflow.catalog import Catalog
from vlmflow.cli.search import query_job
from vlmflow.config import CatalogConfig, ImageLimits, Job, SourceConfig, StorageConfig
from vlmflow.errors import ExplainError, StorageAccessError, StoreLostError
from vlmflow.imaging import hash_of
from vlmflow.report.write import write_report
from vlmflow.search.query import Query, search_job
from vlmflow.search.results import Hit
from vlmflow.search.searcher import search_images
from vlmflow.search.thumbnails import make_thumbnails
from vlmflow.sources.again import RowReader
from vlmflow.web.pictures import COLUMNS, Pictures

JOB = "source: {uri: list.csv, http: {allow_private_addresses: true}}\ncatalog: {uri: c}\nprofile: starter\n"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        site.kept["a"] = encode(scene(), "PNG")
        yield site


@pytest.fixture
def catalog(tmp_path: Path, site: Site) -> CatalogConfig:
    """Rows whose images lie on a server of this machine, which only a job may allow."""
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    uris, hashes = [f"{site.url}/kept/a", f"{site.url}/kept/a?size=2"], [hash_of(site.kept["a"])] * 2
    site.kept["a?size=2"] = site.kept["a"]
    put_rows(config, ["a", "b"], uri=uris, content_hash=hashes, decision=["allow"] * 2)
    return config


def hit_of(row: dict[str, Any], rank: int) -> Hit:
    known = {name: row[name] for name in ("image_id", "uri", "object_version", "content_hash", "decision", "status")}
    more = {"caption": None, "decision_reason": None, "key": None, "ingest_date": "2026-03-01"}
    return Hit.model_validate({**known, **more, "rank": rank, "score": 0.5})


def job_of(catalog: CatalogConfig, **source: Any) -> Job:
    told = {"source": {"uri": "list.csv", **source}, "catalog": catalog.model_dump(), "profile": "starter"}
    return Job.model_validate(told)


def test_pictures_are_read_as_the_job_says(catalog: CatalogConfig, tmp_path: Path) -> None:
    allowed, page = job_of(catalog, http={"allow_private_addresses": True}), tmp_path / "report.html"
    row = Catalog.open(catalog).images(COLUMNS).to_pylist()[0]
    evidence = explain.evidence_of(Catalog.open(catalog).images(explain.EVIDENCE_COLUMNS).to_pylist()[0])
    hits = search_images(catalog, Query(like=row["uri"])).hits

    def media_type(job: Job | None) -> str:
        async def make() -> str:
            return (await Pictures(catalog, job).small(row, "small", blurred=False)).media_type

        return anyio.run(make)

    assert make_thumbnails(hits, catalog)[0].uri is None
    assert make_thumbnails(hits, catalog, job=allowed)[0].uri is not None
    assert [media_type(job) for job in (None, allowed)] == ["image/svg+xml", "image/jpeg"]
    assert [write_report(catalog, page, job=job).num_pictures for job in (None, allowed)] == [0, 2]
    assert hash_of(explain._read(allowed, evidence)) == evidence.content_hash
    with pytest.raises(ExplainError, match="private"):
        explain._read(job_of(catalog), evidence)


def test_nothing_is_asked_of_an_address_without_content(tmp_path: Path, site: Site) -> None:
    """Of the rows one was refused in its time; a job that allows private addresses must not reach it blindly."""
    site.kept |= {"refused": site.kept["a"]}
    config, uris = (
        CatalogConfig(uri=str(tmp_path / "catalog")),
        [f"{site.url}/kept/{name}" for name in ("a", "refused")],
    )
    put_rows(config, ["a", "b"], uri=uris, content_hash=[hash_of(site.kept["a"]), None], decision=["allow", "review"])
    allowed = job_of(config, http={"allow_private_addresses": True})
    rows = {row["uri"]: row for row in Catalog.open(config).images(explain.EVIDENCE_COLUMNS).to_pylist()}
    hits = [hit_of(rows[uri], rank) for rank, uri in enumerate([uris[1], uris[0], uris[1]])]
    shown = make_thumbnails(hits, config, job=allowed)
    assert [picture.uri is not None for picture in shown] == [False, True, False]
    assert shown[0].reason == "it could not be read when it was enriched"
    write_report(config, tmp_path / "report.html", job=allowed)
    with pytest.raises(ExplainError, match="could not be read"):
        explain._read(allowed, explain.evidence_of(rows[uris[1]]))
    assert site.requests["/kept/a"] == 2
    assert "/kept/refused" not in site.requests


def test_a_disk_that_is_lost_is_told_without_the_file_of_another_image(
    catalog: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: object, images: object) -> None:
        raise lost

    monkeypatch.setattr(RowReader, "read", read)
    row = Catalog.open(catalog).images(COLUMNS).to_pylist()[0]
    evidence = explain.evidence_of(Catalog.open(catalog).images(explain.EVIDENCE_COLUMNS).to_pylist()[0])
    hits = search_images(catalog, Query(like=row["uri"])).hits
    lost = StoreLostError("/secret/b.jpg, which was read before, is gone", remedy="Mount it.")
    lost.__cause__ = FileNotFoundError("/secret/b.jpg")
    told = [make_thumbnails(hits, catalog)[0].reason, Pictures(catalog)._read(row).message]
    with pytest.raises(StoreLostError) as caught:
        explain._read(job_of(catalog), evidence)
    told.append(str(caught.value).removeprefix(f"{evidence.uri}: "))
    assert told == ["the disk that it lies on is out of reach"] * 3
    lost = StoreLostError("lost in mid-run: s3://b refused the credentials")
    lost.__cause__ = StorageAccessError("s3://b refused the credentials")
    assert make_thumbnails(hits, catalog)[0].reason == "s3://b refused the credentials"


def test_the_command_takes_a_job_file(catalog: CatalogConfig, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.replace("profile: starter\n", ""))  # which loads no model
    page = str(tmp_path / "report.html")
    assert run("report", catalog.uri, "-o", page, "--config", str(tmp_path / "job.yaml"), "--json") == 0
    assert "data:image/jpeg" in Path(page).read_text(encoding="utf-8")


def test_a_job_file_without_a_source_reaches_the_images_as_its_catalog(tmp_path: Path) -> None:
    storage, path = "storage: {endpoint: 'http://tables:1'}", tmp_path / "job.yaml"

    def endpoint(text: str, option: str | None = None) -> str | None:
        path.write_text(text + "profile: starter\n")
        job = query_job("s3://b/c", None, path, option)
        assert job is not None
        assert job.source.uri == "s3://b/c"
        return job.source.storage.endpoint

    assert endpoint(f"catalog: {{uri: c, {storage}}}\n") == "http://tables:1"
    assert endpoint(f"source:\ncatalog: {{uri: c, {storage}}}\n") == "http://tables:1"
    assert endpoint(f"catalog: {{uri: c, {storage}}}\n", "http://option:1") == "http://option:1"
    assert endpoint(f"source: {{uri: s}}\ncatalog: {{uri: c, {storage}}}\n") is None
    assert endpoint(f"source: {{uri: s, {storage}}}\ncatalog: {{uri: c}}\n") == "http://tables:1"
    assert endpoint("") is None


def test_a_map_of_a_job_file_without_a_source_reaches_the_image_as_its_catalog(
    catalog: CatalogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text("catalog: {uri: c, storage: {endpoint: 'http://tables:1'}}\nprofile: starter\n")
    jobs: list[Job] = []

    def write_heatmap(job: Job, *_: Any, **__: Any) -> dict[str, Any]:
        jobs.append(job)
        raise ExplainError("drawn")

    monkeypatch.setattr(explain, "write_heatmap", write_heatmap)
    uri = Catalog.open(catalog).images(["uri"])["uri"][0].as_py()
    run("explain", catalog.uri, uri, "--heatmap", str(tmp_path / "a.png"), "-c", str(tmp_path / "job.yaml"))
    assert [job.source.storage.endpoint for job in jobs] == ["http://tables:1"]


def test_stores_are_reached_as_the_source_says_and_the_disk_as_the_catalog_does() -> None:
    other = StorageConfig(endpoint="http://photos:1")
    catalog = CatalogConfig(uri="s3://b/c", storage=StorageConfig(endpoint="http://tables:1"))
    reader = RowReader(catalog, ImageLimits(), SourceConfig(uri="/photos", storage=other))._reader
    assert (reader._config.storage, reader._config.uri) == (other, "s3://b/c")
    assert RowReader(catalog, ImageLimits())._reader._config.storage == catalog.storage
    assert search_job(catalog, "starter").source.storage == catalog.storage
