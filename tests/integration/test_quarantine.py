"""An image that takes its worker down costs its own row and no other."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

import pyarrow as pa
import pytest

from tests.pictures import write_pictures
from vlmflow.catalog import Catalog
from vlmflow.config import ImageLimits, Job
from vlmflow.engine import enrich, pipeline, run
from vlmflow.engine.quarantine import Quarantine
from vlmflow.errors import UnreconciledError
from vlmflow.sources import Fetched, Reader, Source, open_source

pytestmark = pytest.mark.usefixtures("ray_session")


class Hanging(bytes):
    """Bytes that hang whoever looks into them, in C code that holds the interpreter's lock."""

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        return bytes(len(re.findall(r"(a+)+$", "a" * 60 + "b")))


@dataclass(frozen=True)
class Deadly:
    """A reader whose process dies at images of certain names, and whose bytes hang a decoder at others."""

    reader: Reader
    kills: tuple[str, ...]
    hangs: tuple[str, ...] = ()

    def read(self, refs: pa.Table) -> list[Fetched]:
        for uri in refs["uri"].to_pylist():
            if self.kills and uri.endswith(self.kills):
                os.kill(os.getpid(), signal.SIGKILL)
        fetched = self.reader.read(refs)
        for number, uri in enumerate(refs["uri"].to_pylist()):
            if self.hangs and uri.endswith(self.hangs):
                fetched[number] = replace(fetched[number], data=Hanging(fetched[number].data or b""))
        return fetched


@dataclass(frozen=True)
class DeadlySource:
    source: Source
    kills: tuple[str, ...]
    hangs: tuple[str, ...] = ()

    @property
    def columns(self) -> pa.Schema:
        return self.source.columns

    @property
    def version(self) -> str | None:
        return self.source.version

    @property
    def num_repeated(self) -> int:
        return self.source.num_repeated

    def list(self) -> Iterator[pa.RecordBatch]:
        return self.source.list()

    def reader(self, limits: ImageLimits) -> Reader:
        return Deadly(self.source.reader(limits), self.kills, self.hangs)


def make_deadly(monkeypatch: pytest.MonkeyPatch, kills: tuple[str, ...], hangs: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(run, "open_source", lambda *given: DeadlySource(open_source(*given), kills, hangs))


def give_others_time(monkeypatch: pytest.MonkeyPatch, hangs: str) -> None:
    """Lets only the image that hangs be given up soon: on a busy machine the first of a fresh process takes long."""
    original = Quarantine.run

    def patiently(self: Quarantine, row: pa.Table) -> pa.Table:
        given = self._config
        if not row["uri"][0].as_py().endswith(hangs):
            self._config = given.model_copy(update={"timeout_s": 300.0})
        try:
            return original(self, row)
        finally:
            self._config = given

    monkeypatch.setattr(Quarantine, "run", patiently)


def test_an_image_that_kills_or_hangs_is_recorded_and_the_others_go_on(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path / "images", 40)
    # The last one hangs: behind it nobody needs another process.
    make_deadly(monkeypatch, kills=(paths[3].name,), hangs=(paths[39].name,))
    # Each retry is a worker's death and the start of another; the next test has them.
    monkeypatch.setattr(pipeline, "TASK_LIMITS", {"max_retries": 0})
    give_others_time(monkeypatch, paths[39].name)
    options = {"limits": {"max_seconds": 3.0}, "quarantine": {"timeout_s": 3.0}}
    job = make_job(tmp_path / "images", tasks=("embed",), **options)

    report = enrich(job)

    assert report.status == "done"
    rows = {Path(row["uri"]).name: row for row in Catalog.open(job.catalog).images().to_pylist()}
    assert len(rows) == 40
    for path, error_class in ((paths[3], "worker_died"), (paths[39], "timed_out")):
        failed = rows.pop(path.name)
        assert (failed["status"], failed["decision"]) == ("failed", "review")
        assert [error["class"] for error in failed["errors"]] == [error_class]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert report.errors == {"worker_died": 1, "timed_out": 1}


@pytest.mark.slow
def test_where_blocks_of_lost_images_are_too_many_smaller_ones_find_the_image(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path / "images", 120)  # in blocks of 32
    make_deadly(monkeypatch, kills=(paths[3].name,))
    monkeypatch.setattr(pipeline, "TASK_LIMITS", {"max_retries": 0})

    report = enrich(make_job(tmp_path / "images", tasks=("embed",), quarantine={"max_images": 5}))

    assert (report.status, report.num_added) == ("done", 120)
    assert report.statuses == {"ok": 119, "failed": 1}
    assert report.errors == {"worker_died": 1}


@pytest.mark.slow
def test_too_many_of_them_stop_the_run_and_name_what_failed(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path / "images", 120)  # more than one task decodes
    make_deadly(monkeypatch, kills=(paths[3].name,))
    monkeypatch.setattr(run, "SMALL_BLOCKS", (16,))  # the test before has them all
    job = make_job(tmp_path / "images", tasks=("embed",), quarantine={"max_images": 5})
    with pytest.raises(UnreconciledError, match="16 of 120 images did not come out of run ") as raised:
        enrich(job)
    assert "set quarantine.max_images (now 5) to at least 16" in raised.value.remedy
    catalog = Catalog.open(job.catalog)
    committed = catalog.images(["uri"]).num_rows
    assert 0 < committed < 120
    (ended,) = catalog.runs.list()
    assert ended.record["status"] == "unreconciled"
    assert f"of run {ended.run_id}, such as" in str(raised.value), "people who are told look for its record"
    monkeypatch.undo()
    assert enrich(job).num_added == 120 - committed
