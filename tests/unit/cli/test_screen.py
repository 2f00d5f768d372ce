"""What commands print: texts from outside draw nothing, and NO_COLOR holds for errors too."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.markup import escape
from rich.table import Table

from tests.report_samples import put_rows
from tests.terminal import run
from vlmflow.cli import main
from vlmflow.cli.options import shown_progress
from vlmflow.cli.screen import Screen, emit
from vlmflow.config import CatalogConfig
from vlmflow.engine.progress import LiveProgress, LogProgress
from vlmflow.moderation.policy import read_text, shipped_policies

EVIL = "\x1b[31mred\x1b]0;title\x07\u202e[bold]x[/bold] :dog: [link=http://evil]\x9b2J"


def test_no_text_draws(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row(escape(EVIL))
    Screen().print(escape(EVIL), table, "[bold]ours[/bold]\nin two lines")
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "\\u001b[31mred" in shown
    assert shown.count("[bold]x[/bold] :dog:") == 2
    assert "ours\nin two lines" in shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_is_folded_for_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ``show | grep`` looks for stays on one line, however long the path before it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    line = f"/{'long' * 18}/catalog: 10 images, 16 vectors"
    Screen().print(line)
    assert (line in capsys.readouterr().out.splitlines()) != is_terminal


def test_names_and_captions_of_a_catalog_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], caption=[f"{EVIL}\nsecond"], uri=["mem://:dog:\x1b[2J\n[red]x.jpg"])
    run("show", config.uri)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert ":dog:\\u001b[2J\\u000a[red]x.jpg" in shown
    assert "[bold]x[/bold] :dog:" in shown


@pytest.mark.parametrize(
    ("no_color", "term", "is_coloured"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_errors_are_without_colour_where_none_is_wanted(
    no_color: str, term: str, is_coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run("show", "no-such-\x1b[2Jcatalog")
    shown = capsys.readouterr().err
    assert shown.startswith("\x1b[31m") == ("\x1b" in shown) == is_coloured
    assert "no-such-\\u001b[2Jcatalog" in shown


def test_data_goes_to_a_stream_that_takes_text_alone() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as sink:
        emit("caf\u00e9 \U0001f642")
        emit("{}", end="")
    assert sink.getvalue() == "caf\u00e9 \U0001f642\n{}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_data_is_utf_8_whatever_the_locale(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt or a caption with other letters would be another one, and JSON knows no ``\\U``."""
    text = "# caf\u00e9 \U0001f642\n" + read_text(next(iter(shipped_policies())))
    (policy := tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], caption=["caf\u00e9 \U0001f642"])

    def written_by(*arguments: str) -> bytes:
        sink = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding=encoding))
        run(*arguments)
        return sink.getvalue()

    assert written_by("policy", "show", str(policy)) == text.encode()
    assert "caf\u00e9 \U0001f642" in json.dumps(
        json.loads(written_by("show", config.uri, "--json")), ensure_ascii=False
    )


@pytest.mark.parametrize(("term", "shown_as"), [("xterm", LiveProgress), ("dumb", LogProgress)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    term: str, shown_as: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown_progress(as_json=False, verbose=False) as display:
        assert isinstance(display, shown_as)


def test_who_reads_no_further_does_not_change_how_a_command_ended() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "vlmflow", "profiles"]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_terminal_of_which_nobody_knows_the_width_is_printed_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    with pytest.raises(SystemExit) as ended:
        main(["policy", "list"])
    assert (ended.value.code, "marketplace" in capsys.readouterr().out) == (0, True)
