"""A run that was taken for dead may not commit any more; what it had committed stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, rows_by_name, write
from vlmflow.catalog import Catalog
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.erase import erase
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.tombstones import Tombstones
from vlmflow.catalog.writer import write_file, writer_of
from vlmflow.errors import RunRevokedError

NAMES = ["a", "b", "c"]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(tmp_path / "catalog")


def revoke(folder: Path, *runs: str) -> None:
    for name in ("images", "embeddings"):
        log = TableLog.open(Folder(config_of(folder)), name)  # type: ignore[arg-type]
        request = CommitRequest(f"revoke-{name}", "vacuum", "revoke", log.refresh().version, runs, always=True)
        commit(log, request, lambda _: Change())


def test_a_revoked_run_commits_no_more(catalog: Catalog, tmp_path: Path) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    others = write(catalog, "r2", [references(["d"])])
    revoke(tmp_path / "catalog", "r1", "r0")
    with pytest.raises(RunRevokedError, match="run r1 gave no sign of life"):
        catalog.commit("r1", files)
    assert rows_by_name(catalog) == {}
    assert catalog.embeddings().num_rows == 0
    assert catalog.commit("r2", others).num_added == 1
    assert enrich(catalog, "r3", [references(NAMES)]).num_added == 3


@pytest.mark.parametrize("how", ["swap", "compact", "erase"])
def test_upkeep_of_a_revoked_run_commits_no_more(catalog: Catalog, tmp_path: Path, how: str) -> None:
    """It plans on the newest version, which comes after the revocation."""
    for name in NAMES:
        enrich(catalog, f"r-{name}", [references([name])])
    folder = Folder(config_of(tmp_path / "catalog"))
    logs = (TableLog.open(folder, "images"), TableLog.open(folder, "embeddings"))
    old = next(iter(catalog.live_files("images").values()))
    new = write_file(folder, "images", read_rows(folder, "images", old), old.ingest_date, "r1")
    revoke(tmp_path / "catalog", "r1")
    before = catalog.live_files("images"), catalog.live_files("embeddings")
    keys = to_binary(pa.array([image_id("a")]))
    upkeep: dict[str, Callable[[], object]] = {
        "swap": lambda: catalog.swap_images("r1", "remoderate", [(old, new)]),
        "compact": lambda: catalog.compact("r1"),
        "erase": lambda: erase(folder, logs, catalog.runs, Tombstones(folder), keys, "r1"),
    }
    with pytest.raises(RunRevokedError, match="run r1 gave no sign of life"):
        upkeep[how]()
    assert (catalog.live_files("images"), catalog.live_files("embeddings")) == before


def test_upkeep_through_a_handle_of_long_ago_needs_no_log_of_long_ago(catalog: Catalog, tmp_path: Path) -> None:
    """The app's, say: deltalake takes away entries that are older than 30 days, behind a checkpoint."""
    for name in NAMES:
        enrich(Catalog.open(config_of(tmp_path / "catalog")), f"r-{name}", [references([name])])
    for table in ("images", "embeddings"):
        DeltaTable(tmp_path / "catalog" / table).create_checkpoint()
        for number in range(len(NAMES)):
            (tmp_path / "catalog" / table / "_delta_log" / f"{number:020d}.json").unlink()
    assert catalog.erase(to_binary(pa.array([image_id("a")]))).num_rows == 1
    assert sorted(rows_by_name(catalog)) == ["b", "c"]


def test_a_commit_made_before_stays_and_is_not_made_again(catalog: Catalog, tmp_path: Path) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    catalog.commit("r1", files)
    revoke(tmp_path / "catalog", "r1")
    again = catalog.commit("r1", files)
    assert again.repeated
    assert sorted(rows_by_name(catalog)) == NAMES


def test_a_commit_without_changes_fences_those_decided_before(catalog: Catalog, tmp_path: Path) -> None:
    log = TableLog.open(Folder(config_of(tmp_path / "catalog")), "images")
    before = log.refresh()
    request = CommitRequest("c1", "r1", "fence", before.version, always=True)
    assert commit(log, request, lambda _: Change()).version == before.version + 1
    assert log.refresh().number == before.number + 1
    assert commit(log, request, lambda _: Change()).repeated
    assert commit(log, CommitRequest("c2", "r1", "none", 0), lambda _: Change()).version == before.version + 1


def test_a_file_tells_who_wrote_it(catalog: Catalog, tmp_path: Path) -> None:
    run = "20260301T010203-0a1b2c3d"
    enrich(catalog, run, [references(NAMES)])
    write(catalog, run, [references(NAMES, version="v2")])
    root = tmp_path / "catalog"
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.parquet")]
    assert {file.split("/")[0] for file in files} == {"images", "embeddings", "staging"}
    assert {writer_of(file) for file in files} == {run}
    foreign = ["images/x.parquet", "images/ingest_date=2026-03-01/part-0.parquet", "notes.txt", "staging/r1/x.parquet"]
    assert [writer_of(file) for file in foreign] == [None] * 4
