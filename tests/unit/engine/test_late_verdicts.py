"""What people and lists say of a run's images stands in its rows when it ends, though they said it before or during."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from ray.exceptions import OutOfDiskError

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, rows_by_name
from vlmflow.catalog import Catalog, keys
from vlmflow.catalog.known_images import KnownImages
from vlmflow.catalog.reviews import EVENT
from vlmflow.catalog.runs import DEAD_AFTER, RunStore
from vlmflow.engine.collect import Collected
from vlmflow.engine.late_verdicts import bring_in_late_verdicts
from vlmflow.engine.run import _Run
from vlmflow.errors import ClusterError
from vlmflow.known import add_list, remove_list
from vlmflow.report.runs import find_run
from vlmflow.review import import_verdicts

NAMES = ["a", "b", "c"]
NO_LISTS = KnownImages([])


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path / "catalog")
    enrich(made, "r1", [references(NAMES)])
    return made


def committed(names: Sequence[str] = NAMES) -> list[pa.Array]:
    return [keys.to_binary(pa.array([image_id(name) for name in names]))]


def block(catalog: Catalog, name: str) -> None:
    said = {"image_id": image_id(name), "content_hash": f"bytes-mem://{name}", "decision": "block", "reviewer": "ada"}
    events = [said | {"at": dt.datetime(2026, 11, 20, tzinfo=dt.UTC)}]
    catalog.reviews.add(pa.Table.from_pylist(events, schema=EVENT))


def died(catalog: Catalog, run_id: str) -> None:
    died_at = time.time() - DEAD_AFTER.total_seconds() - 5
    os.utime(Path(catalog.uri) / "runs" / f"{run_id}.lease", (died_at, died_at))


def blocked(catalog: Catalog) -> set[str]:
    return {name for name, row in rows_by_name(catalog).items() if row["decision"] == "block"}


def test_the_verdict_on_bytes_that_come_back_holds_again(catalog: Catalog) -> None:
    block(catalog, "a")
    catalog.apply_verdicts()
    enrich(catalog, "r2", [references(["a"], version="v2")], content="others")
    bring_in_late_verdicts(catalog, "r2", NO_LISTS, committed(["a"]))
    assert blocked(catalog) == set()
    block(catalog, "b")  # of a row that this run does not touch: whoever says it brings it in
    enrich(catalog, "r3", [references(["a"], version="v3")])
    bring_in_late_verdicts(catalog, "r3", NO_LISTS, committed(["a"]))
    assert blocked(catalog) == {"a"}


def test_a_list_that_is_changed_during_a_run_is_looked_up_at_its_end(catalog: Catalog) -> None:
    before = catalog.known_images.matcher()
    add_list(config_of(catalog.uri), "banned", "block", ["bytes-mem://d", "bytes-mem://a"])
    during = catalog.known_images.matcher()
    assert blocked(catalog) == {"a"}
    enrich(catalog, "r2", [references(["d"])])  # by workers that do not know the list
    version = catalog.version
    bring_in_late_verdicts(catalog, "r2", during, committed(["d"]))
    assert catalog.version == version, "the workers had that list"
    bring_in_late_verdicts(catalog, "r2", before, committed(["d"]))
    assert blocked(catalog) == {"a", "d"}
    # Taken away, while a run still goes by it.
    remove_list(config_of(catalog.uri), "banned")
    assert blocked(catalog) == set()


def test_the_run_after_one_that_was_killed_looks_at_every_row(catalog: Catalog) -> None:
    catalog.runs.start("killed", {})
    block(catalog, "b")
    bring_in_late_verdicts(catalog, "r2", None, [])
    assert blocked(catalog) == {"b"}
    catalog.runs.finish("killed", {})
    block(catalog, "c")
    bring_in_late_verdicts(catalog, "r3", None, [])
    assert blocked(catalog) == {"b"}


def test_what_was_said_by_a_command_that_was_killed_before_the_rows_followed(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, verdicts = config_of(catalog.uri), tmp_path / "verdicts.csv"
    verdicts.write_text("uri,verdict\nmem://b,block\n")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def after_a_kill_of(command: Callable[[], object], number: int) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "apply_verdicts", killed)
            patch.setattr(RunStore, "conclude", lambda *_, **__: None)  # nothing is done after a kill
            with pytest.raises(KeyboardInterrupt):
                command()
        bring_in_late_verdicts(catalog, f"next{number}", None, [])
        found = blocked(catalog)
        for run_id in catalog.runs.states():
            catalog.runs.conclude(run_id, None)
        return found

    assert after_a_kill_of(lambda: add_list(config, "banned", "block", ["bytes-mem://a"]), 1) == {"a"}
    assert after_a_kill_of(lambda: import_verdicts(config, verdicts, reviewer="ada"), 2) == {"a", "b"}
    assert after_a_kill_of(lambda: remove_list(config, "banned"), 3) == {"b"}


def test_every_row_is_looked_at_once_for_a_run_that_died(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.runs.start("killed", {})
    for name in ("a", "b"):  # while it may go on
        block(catalog, name)
        bring_in_late_verdicts(catalog, "r2", None, [])
    assert blocked(catalog) == {"a", "b"}
    died(catalog, "killed")  # before the rows were looked at
    monkeypatch.setattr(Catalog, "apply_verdicts", _stopped)
    bring_in_late_verdicts(catalog, "r3", None, [])
    monkeypatch.undo()
    catalog.runs.heartbeat("killed")  # it was suspended, and goes on
    block(catalog, "c")
    bring_in_late_verdicts(catalog, "r4", None, [])
    assert blocked(catalog) == {"a", "b", "c"}


def test_a_vacuum_looks_at_every_row_before_it_buries_a_run(catalog: Catalog) -> None:
    catalog.runs.start("killed", {})
    add_list(config_of(catalog.uri), "banned", "block", ["bytes-mem://d"])
    enrich(catalog, "killed", [references(["d"])])  # by workers that do not know the list
    died(catalog, "killed")
    assert catalog.vacuum().revoked == ("killed",)
    assert catalog.runs.state("killed") == "finished"
    assert blocked(catalog) == {"d"}


@pytest.mark.parametrize("early", [False, True])
def test_the_run_after_one_that_was_stopped_while_it_brought_them_in_looks_at_every_row(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """``early``: the run was on its way to its end with an error."""
    with pytest.raises(KeyboardInterrupt):
        _stop_a_run(catalog, monkeypatch, early)
    monkeypatch.undo()
    shown = find_run(catalog, "stopped")
    assert shown is not None
    assert (shown.state, shown.record["status"]) == ("finished", "interrupted")
    assert blocked(catalog) == set()
    bring_in_late_verdicts(catalog, "r3", catalog.known_images.matcher(), [])
    assert blocked(catalog) == {"d"}
    catalog.runs.bury("stopped")
    assert (catalog.runs.get("stopped") or {})["status"] == "interrupted", "it says itself how it ended"


def test_a_run_that_brought_them_in_is_finished(catalog: Catalog) -> None:
    run = _run("done")
    with run._recorded(catalog), run._with_late_verdicts(catalog, SimpleNamespace(known=NO_LISTS)):  # type: ignore[arg-type]
        run._collected.keys += committed()
    assert catalog.runs.state("done") == "finished"


def test_a_run_under_which_ray_gives_up_is_recorded_in_our_words(catalog: Catalog) -> None:
    run = _run("given up")
    with pytest.raises(ClusterError, match="no room left"), run._recorded(catalog):
        raise OutOfDiskError("Local disk is full. " + "x" * 10_000)
    assert "no room left" in (catalog.runs.get("given up") or {})["message"]


class _Report(SimpleNamespace):
    def model_dump(self, mode: str) -> dict[str, str]:
        return {"status": self.status, "message": vars(self).get("message", "")}


def _run(run_id: str) -> _Run:
    run = _Run.__new__(_Run)
    report = lambda status, message="": _Report(status=status, message=message)  # noqa: E731
    run.__dict__ |= {"_run_id": run_id, "_report": _Report(status="running"), "_finished": report}
    run._collected, run._verdicts_due = Collected(), False
    return run


def _stop_a_run(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    run = _run("stopped")
    before = SimpleNamespace(known=catalog.known_images.matcher())
    with run._recorded(catalog), run._with_late_verdicts(catalog, before):  # type: ignore[arg-type]
        add_list(config_of(catalog.uri), "banned", "block", ["bytes-mem://d"])
        enrich(catalog, "stopped", [references(["d"])])
        run._collected.keys += committed(["d"])
        monkeypatch.setattr(Catalog, "apply_verdicts", _stopped)
        if early:
            raise ValueError


def _stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
