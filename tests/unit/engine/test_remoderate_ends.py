"""How a backfill ends whose store goes away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of
from vlmflow.catalog import Catalog
from vlmflow.catalog.runs import RunStore
from vlmflow.engine.remoderate import _Remoderation
from vlmflow.errors import StorageAccessError, StoreLostError, TransientError, VlmflowError


def ending_with(error: BaseException, catalog: Catalog) -> _Remoderation:
    def run() -> None:
        raise error

    remoderation = _Remoderation.__new__(_Remoderation)
    record = lambda status: {"operation": "remoderate", "status": status}  # noqa: E731
    remoderation.__dict__ |= {"_dry_run": False, "_catalog": catalog, "_run_id": "r1", "_record": record, "_run": run}
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
