"""A catalog that lies among its images: its own files are no images, whatever way leads to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmflow.config import CatalogConfig, SourceConfig, StorageConfig
from vlmflow.errors import ConfigError
from vlmflow.sources import open_source
from vlmflow.sources.nested import catalog_beside


def names(source: SourceConfig, catalog: Path | str) -> list[str]:
    """What is listed, below the source."""
    listed = open_source(source, CatalogConfig(uri=str(catalog))).list()
    return sorted(uri.removeprefix(f"{source.uri}/") for batch in listed for uri in batch["uri"].to_pylist())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with an image, and with a catalog in `tables`."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "tables/images/part.parquet", "tables/runs/r1.json", "tables2/b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_files_of_the_catalog_are_not_listed(photos: Path) -> None:
    source = SourceConfig(uri=str(photos))
    assert names(source, f"{photos}/./tables//") == ["a.jpg", "tables2/b.jpg"]
    assert names(source, f"file://{photos}/tables") == ["a.jpg", "tables2/b.jpg"]
    assert names(SourceConfig(uri=str(photos), kind="parquet", allow_empty=True), photos / "tables") == []
    assert len(names(source, photos / "not-yet")) == 4


def test_a_link_leads_to_no_file_of_the_catalog(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(photos / "tables")
    assert names(SourceConfig(uri=str(photos)), tmp_path / "elsewhere") == ["a.jpg", "tables2/b.jpg"]
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/part").write_bytes(b"x")
    (photos / "link").symlink_to(tmp_path / "beside")
    assert "link/part" not in names(SourceConfig(uri=str(photos)), tmp_path / "beside")


@pytest.mark.parametrize("place", ["tables", "tables/", "tables/images", "link", "link/images"])
def test_a_source_in_its_catalog_is_refused(photos: Path, place: str) -> None:
    (photos / "link").symlink_to(photos / "tables")
    with pytest.raises(ConfigError, match=r"the source .* (lies in|is) the catalog") as caught:
        open_source(SourceConfig(uri=f"{photos}/{place}"), CatalogConfig(uri=f"{photos}/tables"))
    assert "Name another place" in caught.value.remedy


def test_a_manifest_may_lie_anywhere(photos: Path) -> None:
    (photos / "tables/list.csv").write_text("uri\n../a.jpg\n")
    source = open_source(SourceConfig(uri=str(photos / "tables/list.csv")), CatalogConfig(uri=str(photos / "tables")))
    assert [batch["uri"].to_pylist() for batch in source.list()] == [[str(photos / "a.jpg")]]


ONE, OTHER = StorageConfig(endpoint="http://minio:80/"), StorageConfig(endpoint="http://other:9000")


@pytest.mark.parametrize(
    ("source", "catalog", "is_same_store"),
    [
        (("s3://b/x", ONE), ("s3a://b/x/c", StorageConfig(endpoint="http://MINIO")), True),
        (("s3://b/x", ONE), ("s3://b/x/c", StorageConfig()), True),
        (("s3://b/x", ONE), ("s3://b/x/c", OTHER), False),
        (("s3://b/x", ONE), ("s3://other/x/c", ONE), False),
        (("s3://b/x", ONE), ("gs://b/x/c", ONE), False),
        (("s3://b/x", ONE), ("/b/x/c", ONE), False),
        (("az://b/x", StorageConfig()), ("abfss://b@account.dfs.core.windows.net/x/c", StorageConfig()), True),
    ],
)
def test_which_stores_are_one(
    source: tuple[str, StorageConfig], catalog: tuple[str, StorageConfig], is_same_store: bool
) -> None:
    beside = CatalogConfig(uri=catalog[0], storage=catalog[1])
    found = catalog_beside(SourceConfig(uri=source[0], storage=source[1]), beside)
    assert (found is not None) == is_same_store
    inside = SourceConfig(uri=f"{catalog[0]}/images", storage=source[1])
    if is_same_store:
        with pytest.raises(ConfigError, match="lies in the catalog"):
            catalog_beside(inside, beside)
