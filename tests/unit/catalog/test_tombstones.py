"""Which erasure or lifting counts where the clocks of machines differ."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of
from vlmflow import schema
from vlmflow.catalog import tombstones
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.tombstones import Tombstones

KEY = pa.array([b"\x01" * 16], schema.KEY)


class Ahead(dt.datetime):
    """A clock that is half a minute ahead."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Ahead:
        return super().now(tz) + dt.timedelta(seconds=30)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(config_of(tmp_path))


def test_an_erasure_holds_after_a_lift_by_a_clock_that_is_ahead(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tombstones(folder).put(KEY)
    with monkeypatch.context() as patch:
        patch.setattr(tombstones.dt, "datetime", Ahead)
        Tombstones(folder).lift(KEY)
    assert len(Tombstones(folder).keys()) == 0
    Tombstones(folder).put(KEY)
    assert Tombstones(folder).keys().to_pylist() == KEY.to_pylist()
    here = Tombstones(folder)
    here.lift(KEY)
    assert len(here.keys()) == len(Tombstones(folder).keys()) == 0
