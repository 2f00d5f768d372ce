"""Ctrl-C: exit code 130 and one line, which does not promise what is not kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.report_samples import put_rows
from tests.terminal import run
from vlmflow import gate
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def told_by(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert run(*command) == 130
    shown = capsys.readouterr()
    return shown.out, shown.err


@pytest.mark.parametrize("command", [["export", "{tmp}", "{tmp}/out"], ["review", "export", "{tmp}", "{tmp}/q.csv"]])
def test_a_command_that_is_interrupted_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Catalog, "open", interrupt)
    told = told_by([word.format(tmp=tmp_path) for word in command], capsys)
    assert told == ("", "vlmflow: interrupted - Run the same command again.\n")


def test_at_a_question_the_line_of_the_question_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(CatalogConfig(uri=str(tmp_path / "catalog")), ["a"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=interrupt))
    monkeypatch.setattr("typer._click.termui.visible_prompt_func", interrupt)
    _, told = told_by(["erase", str(tmp_path / "catalog"), "--uri", "mem://a"], capsys)
    assert told.endswith("[y/N]:\nvlmflow: interrupted - Run the same command again.\n")


def test_machines_are_told_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Catalog, "open", interrupt)
    out, _ = told_by(["search", str(tmp_path), "--build-index", "--json"], capsys)
    assert json.loads(out)["event"] == "error"


def test_of_a_scratch_catalog_nothing_is_said_to_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "golden_values", interrupt)
    monkeypatch.chdir(tmp_path)
    _, told = told_by(["gate", "accept", str(tmp_path), "--profile", "starter"], capsys)
    assert told == "vlmflow: interrupted; nothing is kept - Run the same command again: it starts anew.\n"


def test_of_a_run_what_was_committed_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmflow.engine.enrich", interrupt)
    command = ["enrich", str(tmp_path), str(tmp_path / "catalog"), "--profile", "starter", "--json"]
    out, told = told_by(command, capsys)
    last = json.loads(out.splitlines()[-1])
    assert (last["event"], last["message"]) == ("error", "interrupted; what was committed stays")
    assert told == "vlmflow: interrupted; what was committed stays - Run the same command again to go on.\n"
