"""How a backfill ends whose store goes away, and how it gets through a catalog of many dates."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tests.catalog_samples import DATE, config_of
from vlmflow.catalog import Catalog
from vlmflow.catalog.log import DataFile
from vlmflow.catalog.runs import RunStore
from vlmflow.engine.relabel_files import Done, Scan
from vlmflow.engine.remoderate import _Remoderation
from vlmflow.engine.scope import Scope
from vlmflow.errors import StorageAccessError, StoreLostError, TransientError, VlmflowError
from vlmflow.moderation.relabel import Changes


def ending_with(error: BaseException, catalog: Catalog) -> _Remoderation:
    def run() -> None:
        raise error

    remoderation = _Remoderation.__new__(_Remoderation)
    record = lambda status: {"operation": "remoderate", "status": status}  # noqa: E731
    remoderation.__dict__ |= {"_dry_run": False, "_catalog": catalog, "_run_id": "r1", "_record": record, "_run": run}
    remoderation._folder = catalog._folder
    return remoderation


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.open_or_create(config_of(tmp_path), pa.schema([]))


@pytest.mark.parametrize(
    "error", [StorageAccessError("refused", remedy="Renew them."), TransientError("away", remedy="Renew them.")]
)
def test_a_store_that_is_lost_is_told_as_such(catalog: Catalog, error: VlmflowError) -> None:
    with pytest.raises(StoreLostError, match=str(error)) as caught:
        ending_with(error, catalog).execute()
    assert caught.value.exit_code == 4
    assert caught.value.remedy.startswith("Renew them. What was committed stays")
    assert (catalog.runs.get("r1") or {})["status"] == "failed"


def test_a_record_that_cannot_be_completed_hides_nothing(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise TransientError("the store is away")

    monkeypatch.setattr(RunStore, "finish", lost)
    with pytest.raises(ValueError, match="what ended it"):
        ending_with(ValueError("what ended it"), catalog).execute()
    assert "record of run r1 could not be completed: the store is away" in caplog.text


def test_files_of_many_dates_are_committed_together_and_vectors_listed_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    listed, scored, swapped = [], [], []

    def live_files(self: Catalog, table: str) -> dict[str, DataFile]:
        listed.append(table)
        return {path: DataFile(path, 1, 1, file.ingest_date) for path, file in files.items()}

    def in_order(_: Any, scans: list[Scan], arguments: Any) -> Iterator[Done]:
        for scan in scans:
            assert arguments(scan)[-1] == f"scores of {scan.file.path}"
            yield Done(scan.file, scan.file, Changes())

    def score(some: list[DataFile], _: Any) -> list[str]:
        scored.extend(file.path for file in some)
        return [f"scores of {file.path}" for file in some]

    files = {f"{day:02}": DataFile(f"{day:02}", 1, 1, DATE + dt.timedelta(days=day)) for day in range(40)}
    monkeypatch.setattr(Catalog, "live_files", live_files)
    remoderation = _Remoderation.__new__(_Remoderation)
    given = {"_catalog": catalog, "_folder": None, "_scope": Scope(), "_dry_run": False, "_count": lambda _: None}
    given |= {"_in_order": in_order, "_score": score, "_swap": lambda pending, _: swapped.append(len(pending))}
    remoderation.__dict__ |= given
    target: Any = None
    remoderation._round([Scan(file, 1, 1) for file in files.values()], catalog.newest_images, target, set())
    assert listed == ["embeddings"]
    assert scored == list(files)
    assert swapped == [32, 8]
