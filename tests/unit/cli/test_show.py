"""`vlmflow show`: what its headings say of the rows below them, and what it says of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_vacuum import let_die
from tests.report_samples import put_rows, record
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.summary import summarize


@pytest.mark.parametrize(("policy", "heading"), [(None, "not moderated yet"), ("demo", "flagged")])
def test_images_that_no_policy_has_seen_are_not_called_flagged(
    policy: str | None, heading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], decision=["review"], policy_name=[policy], policy_version=[policy])
    run("show", config.uri)
    shown = capsys.readouterr().out
    assert heading in shown
    assert ("flagged" in shown) == (heading == "flagged")


def test_a_run_of_upkeep_is_named_and_how_it_ended_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"])
    runs = Catalog.open(config).runs
    moderation = {"operation": "remoderate", "num_moved": 0, "started_at": "2099-01-01T00:00:00+00:00"}
    for run_id in ("killed", "at-work"):
        runs.start(run_id, moderation | {"status": "running", "state": "running"})
    let_die(tmp_path / "catalog", "killed")
    runs.finish("moved", moderation | {"status": "done", "state": "done", "num_moved": 1200})
    with pytest.raises(KeyError), runs.recorded("erase") as erasure:
        raise KeyError
    lines = {line.run_id: line for line in summarize(config).runs}
    states = {name: lines[name].state for name in ("killed", "at-work", "moved", erasure)}
    assert states == {"killed": "dead", "at-work": "running", "moved": "done", erasure: "failed"}
    run("show", config.uri)
    shown = " ".join(capsys.readouterr().out.split())
    assert "erase" in shown
    assert "remoderate: 1,200 rows" in shown
    monkeypatch.setenv("COLUMNS", "80")
    run("show", config.uri)
    assert erasure in capsys.readouterr().out  # in one piece


def test_what_a_run_has_committed_that_was_killed_or_still_goes_on_is_shown(tmp_path: Path) -> None:
    """Its record has no counts yet: as if it had done nothing."""
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="before")
    unfinished = {"finished_at": None, "num_added": 0, "statuses": {}, "decisions": {}, "errors": {}}
    runs = Catalog.open(config).runs
    for run_id in ("killed", "at-work"):
        runs.start(run_id, record(run_id, status="running", **unfinished))
    runs.finish("done", record("done", num_added=7))
    put_rows(config, ["b", "c"], run="killed")
    runs.amend("killed", num_replaced=1)
    runs.amend("nobody", num_replaced=1)
    put_rows(config, ["d"], run="at-work")
    let_die(tmp_path / "catalog", "killed")
    lines = {line.run_id: (line.state, line.num_added, line.num_replaced) for line in summarize(config).runs}
    assert lines == {"killed": ("dead", 1, 1), "at-work": ("running", 1, 0), "done": ("done", 7, 0)}
