"""Vacuum: what nobody needs goes, what anybody may still need stays."""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import os
import time
from pathlib import Path

import obstore
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from tests.catalog_samples import config_of, enrich, open_catalog, references, rows_by_name, write
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.runs import DEAD_AFTER
from vlmflow.cli import main
from vlmflow.config import CatalogConfig
from vlmflow.errors import ConfigError, RunRevokedError

NAMES = ["a", "b", "c"]
NOW = dt.timedelta()


@pytest.fixture
def catalog(root: Path) -> Catalog:
    return open_catalog(root)


def files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix() for path in root.rglob("*.parquet") if "_delta_log" not in path.as_posix()
    }


def let_die(root: Path, run_id: str) -> None:
    old = time.time() - DEAD_AFTER.total_seconds() - 5
    os.utime(root / "runs" / f"{run_id}.lease", (old, old))


def start(catalog: Catalog, *runs: str) -> None:
    for run in runs:
        catalog.runs.start(run, {"status": "running"})


def test_orphans_of_killed_runs_go_and_the_runs_are_shut_out(catalog: Catalog, root: Path) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    start(catalog, "killed")
    written = write(catalog, "killed", [references(["d"]), references(NAMES, version="v2")])
    let_die(root, "killed")
    live = {f"images/{path}" for path in catalog.live_files("images")}
    live |= {f"embeddings/{path}" for path in catalog.live_files("embeddings")}
    assert len(files(root)) == len(live) + written.num_rows

    result = catalog.vacuum(retention=NOW)

    assert files(root) == live
    assert result.num_files == {"orphan": 2, "staged": 1, "old": 0}
    assert result.num_bytes["orphan"] > 0
    assert result.revoked == ("killed",)
    assert catalog.runs.state("killed") == "finished"
    assert (catalog.runs.get("killed") or {})["state"] == "dead"
    with pytest.raises(RunRevokedError, match="run killed"):
        catalog.commit("killed", written)
    assert sorted(rows_by_name(catalog)) == NAMES
    assert enrich(catalog, "r1", [references(["d"])]).num_added == 1


def test_nothing_of_a_live_run_is_touched(catalog: Catalog, root: Path) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    start(catalog, "live")
    written = write(catalog, "live", [references(["d"]), references(NAMES, version="v2")])
    before = files(root)
    result = catalog.vacuum(retention=NOW)
    assert files(root) == before
    assert (sum(result.num_files.values()), result.num_pending, result.live_runs) == (0, written.num_rows, ("live",))
    done = catalog.commit("live", written)
    assert (done.num_added, done.num_replaced) == (1, 3)


def test_files_of_a_run_without_a_record_stay_for_a_day(catalog: Catalog, root: Path) -> None:
    write(catalog, "nobody", [references(NAMES)])
    assert catalog.vacuum(retention=NOW).num_pending == 2
    for path in files(root):
        os.utime(root / path, (time.time() - 25 * 3600,) * 2)
    assert catalog.vacuum(retention=NOW).num_files["orphan"] == 2
    assert files(root) == set()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_old_versions_stay_for_the_retention(catalog: Catalog, root: Path, checkpoint: bool) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    first = Catalog.open(config_of(root)).version
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    if checkpoint:
        DeltaTable(str(root / "images")).create_checkpoint()
    (old,) = {path for path in files(root) if path.startswith("images/") and "/r0-" in path}
    start(catalog, "r0")  # also if its run is long over
    catalog.runs.finish("r0", {})

    kept = catalog.vacuum(retention=dt.timedelta(hours=1))
    assert (kept.num_kept, sum(kept.num_files.values())) == (1, 0)
    assert DeltaTable(str(root / "images"), version=first).to_pyarrow_table().num_rows == 3
    gone = catalog.vacuum(retention=NOW)
    assert gone.num_files["old"] == 1
    assert not (root / old).exists()
    assert {row["object_version"] for row in rows_by_name(catalog).values()} == {"v2"}


def test_records_of_upkeep_go_with_the_retention(
    catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older versions of the app left one for each verdict: thousands in a day; and each erasure reads them all."""
    for number in range(40):
        record = {"operation": ("erase", "index", "review", "vacuum")[number % 4], "status": "done"}
        catalog.runs.finish(f"20260301T0200{number:02}-a", record)
    catalog.runs.finish("20260301T030000-a", {"operation": "remoderate", "status": "done"})
    with catalog.runs.recorded("review") as fresh:
        pass
    assert catalog.vacuum(dry_run=True).num_records == 40
    assert len(catalog.runs.states()) >= 42
    with pytest.raises(SystemExit):
        main(["vacuum", str(root)])
    assert "removed 40 records of upkeep" in " ".join(capsys.readouterr().out.split())
    left = catalog.runs.states()
    assert {"20260301T030000-a", fresh} < left.keys()
    assert "20260301T020000-a" not in left


def test_a_dry_run_changes_nothing(catalog: Catalog, root: Path) -> None:
    start(catalog, "killed")
    written = write(catalog, "killed", [references(NAMES)])
    let_die(root, "killed")
    version = catalog.version
    result = catalog.vacuum(retention=NOW, dry_run=True)
    assert (result.dry_run, result.num_files["orphan"], result.revoked) == (True, 2, ("killed",))
    assert (catalog.version, len(files(root))) == (version, 2)
    assert catalog.commit("killed", written).num_added == 3


def test_what_is_not_ours_stays_and_is_named(catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images" / "notes.txt").write_text("mine")
    (root / "images" / "part-0.parquet").write_bytes(b"mine too")
    with pytest.raises(SystemExit) as ended:
        main(["vacuum", str(root), "--retention-hours", "0"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "removed 0 files" in shown
    assert "2 files are not vlmflow's and stay" in shown
    assert (root / "images" / "notes.txt").exists()
    assert (root / "images" / "part-0.parquet").exists()


def test_the_command_line_speaks_json_and_refuses_odd_retentions(
    root: Path, catalog: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["vacuum", str(root), "--dry-run", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["num_files"] == {"orphan": 0, "staged": 0, "old": 0}
    for retention in (dt.timedelta(hours=-1), dt.timedelta(days=31)):
        with pytest.raises(ConfigError, match="is not between 0 and 720"):
            catalog.vacuum(retention=retention)
    for hours in ("nan", "inf", "-inf", "1e300", "721"):
        with pytest.raises(SystemExit) as ended:
            main(["vacuum", str(root), "--retention-hours", hours])
        assert ended.value.code == 2
        assert "is not between 0 and 720" in capsys.readouterr().err


def test_a_file_that_cannot_be_deleted_is_left_for_the_next(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(catalog, "killed")
    write(catalog, "killed", [references(NAMES)])
    let_die(root, "killed")
    stubborn = next(path for path in files(root) if path.startswith("images/"))
    original = Folder._deleted

    def refuse(self: Folder, path: str) -> bool:
        return path != stubborn and original(self, path)

    monkeypatch.setattr("vlmflow.catalog.folder.obstore.delete", _failing_for_lists())
    monkeypatch.setattr(Folder, "_deleted", refuse)
    assert catalog.vacuum(retention=NOW).failed == (stubborn,)
    monkeypatch.undo()
    assert catalog.vacuum(retention=NOW).num_files["orphan"] == 1
    assert files(root) == set()


def _failing_for_lists() -> object:
    original = obstore.delete

    def delete(store: object, paths: object) -> None:
        if isinstance(paths, list):
            raise OSError("one of them was refused")
        original(store, paths)  # type: ignore[arg-type]

    return delete


def _write_in_a_loop(root: str, number: int, count: int) -> None:
    catalog = Catalog.open(config_of(root))
    for turn in range(count):
        run = f"w{number}-{turn}"
        catalog.runs.start(run, {})
        names = [f"{number}-{turn}", "shared"]
        catalog.commit(run, write(catalog, run, [references(names, version=f"v{number}-{turn}")]))
        catalog.runs.finish(run, {})


def test_vacuums_beside_writers_lose_nothing(catalog: Catalog, root: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_in_a_loop, args=(str(root), number, 8)) for number in range(2)]
    for writer in writers:
        writer.start()
    removed = 0
    while any(writer.is_alive() for writer in writers):
        # A retention of zero takes old versions from under readers: here nobody reads one.
        removed += sum(catalog.vacuum(retention=dt.timedelta(hours=1)).num_files.values())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    expected = {f"{number}-{turn}" for number in range(2) for turn in range(8)} | {"shared"}
    assert set(rows_by_name(catalog)) == expected
    assert catalog.embeddings().num_rows == 2 * len(expected)
    catalog.vacuum(retention=NOW)
    live = {f"images/{path}" for path in catalog.live_files("images")}
    assert files(root) == live | {f"embeddings/{path}" for path in catalog.live_files("embeddings")}


def test_on_a_store(s3_server: S3Server) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    catalog = Catalog.open_or_create(config, pa.schema([]))
    enrich(catalog, "r0", [references(NAMES)])
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    start(catalog, "over")
    write(catalog, "over", [references(["d", "e"])])
    catalog.runs.finish("over", {})
    result = catalog.vacuum(retention=NOW)
    # The staged file of r1 went with its commit.
    assert result.num_files == {"orphan": 2, "staged": 0, "old": 1}
    assert sorted(rows_by_name(catalog)) == NAMES
    assert sum(catalog.vacuum(retention=NOW).num_files.values()) == 0
