"""What a process leaves of a file that it was writing when it was killed: no listing of the disk's store shows it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.catalog_samples import config_of, enrich, open_catalog, references, rows_by_name
from tests.erasing import key
from tests.integration.test_vacuum import NOW, let_die, start
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.runs import DEAD_AFTER

NAMES = ["a", "b", "secret"]
WRITER = """
import resource, signal, sys
from vlmflow.config import CatalogConfig
from vlmflow.catalog.folder import Folder
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
Folder(CatalogConfig(uri=sys.argv[1])).write(sys.argv[2], bytes(2 << 20))
"""


@pytest.fixture
def catalog(root: Path) -> Catalog:
    catalog = open_catalog(root)
    enrich(catalog, "r0", [references(NAMES)])
    return catalog


def unfinished(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*#*")}


def leave(root: Path, *paths: str, age_s: float = 0.0) -> set[str]:
    """Puts unfinished files there, with what a finished one holds."""
    whole = next(root.glob("images/ingest_date=*/*.parquet"))
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(whole.read_bytes())
        os.utime(root / path, (time.time() - age_s,) * 2)
    return set(paths)


def files_of(run_id: str) -> tuple[str, str, str]:
    name = f"ingest_date=2026-03-01/{run_id}-{'a' * 32}.parquet"
    return (f"images/{name}#1", f"embeddings/{name}#12", f"staging/{run_id}/{'b' * 32}.parquet#1")


def test_a_killed_writer_leaves_one_and_it_can_be_removed(root: Path) -> None:
    path = "images/ingest_date=2026-03-01/r-1.parquet"
    done = subprocess.run([sys.executable, "-c", WRITER, str(root), path], check=False)
    assert done.returncode < 0
    folder = Folder(config_of(root))
    assert list(folder.list("images")) == []
    (left,) = folder.unfinished("images")
    assert (left.finished_path, left.size_bytes) == (path, 1 << 20)
    assert folder.delete_all([left.path, "images/another#1"]) == []
    assert unfinished(root) == set()
    assert list(folder.unfinished("images")) == list(folder.unfinished("nowhere")) == []


def test_of_runs_that_are_over_they_go_and_of_others_they_stay(catalog: Catalog, root: Path) -> None:
    start(catalog, "killed", "live")
    let_die(root, "killed")
    gone = leave(root, *files_of("killed"))
    stay = leave(root, *files_of("live"))
    found = catalog.verify([references(NAMES)], {}, num_examples=9)
    assert set(found.findings["orphan_files"].examples) == gone

    result = catalog.vacuum(retention=NOW)

    assert result.num_files == {"orphan": 2, "staged": 1, "old": 0}
    assert (result.num_pending, result.num_foreign) == (3, 0)
    assert unfinished(root) == stay
    assert sorted(rows_by_name(catalog)) == NAMES


def test_of_nobodys_run_they_go_when_nobody_can_be_writing_them_any_more(catalog: Catalog, root: Path) -> None:
    log = "_delta_log/00000000000000000009"
    killed = "reviews/v.parquet#1", "runs/r9.lease#2", f"images/{log}.json#1", f"embeddings/{log}.checkpoint.parquet#1"
    old = leave(root, *killed, age_s=DEAD_AFTER.total_seconds() + 5)
    stay = leave(root, "reviews/w.parquet#1", "images/_delta_log/00000000000000000010.json#1")
    assert catalog.vacuum(retention=NOW, dry_run=True).num_files["orphan"] == len(old)
    assert catalog.vacuum(retention=NOW).num_files["orphan"] == len(old)
    assert unfinished(root) == stay


def test_an_erasure_leaves_none_that_may_hold_the_image(catalog: Catalog, root: Path) -> None:
    start(catalog, "killed")
    let_die(root, "killed")
    leave(root, *files_of("killed"), "runs/r9.lease#1")
    leave(root, "reviews/v.parquet#1", "indexes/i.faiss#1", age_s=DEAD_AFTER.total_seconds() + 5)
    young = leave(root, "reviews/w.parquet#1")

    first = catalog.erase(key("secret"))
    assert unfinished(root) == {*young, "runs/r9.lease#1"}  # a lease holds no image
    assert (first.is_complete, set(first.failed)) == (False, young)
    assert first.num_files == 5 + 2  # and old versions of both tables
    leave(root, *young, age_s=DEAD_AFTER.total_seconds() + 5)
    assert catalog.erase(key("secret")).is_complete
    assert unfinished(root) == {"runs/r9.lease#1"}


def test_files_of_others_that_are_called_so_stay(catalog: Catalog, root: Path) -> None:
    stay = leave(root, "images/notes#7")
    result = catalog.vacuum(retention=NOW)
    assert (result.foreign, unfinished(root)) == (("images/notes#7",), stay)
    assert catalog.verify([references(NAMES)], {}).findings["foreign_files"].count == 1
