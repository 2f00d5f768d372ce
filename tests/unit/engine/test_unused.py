"""What none of a job's tasks reads: refused on the command line, told of job files."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.terminal import run
from vlmflow.checks import doctor_of
from vlmflow.config import Job
from vlmflow.engine import plan
from vlmflow.engine.report import RunReport
from vlmflow.engine.unused import unused_settings
from vlmflow.views import print_plan, print_report

MODEL = {"family": "git", "path": "models/git"}
ALL: dict[str, Any] = {
    "source": {"uri": "photos", "text_column": "title", "questions_column": "ask"},
    "questions": ["what is it?"],
    "policy": "demo",
    "models": {"caption": MODEL},
    "max_caption_tokens": 30,
    "num_beams": 4,
}


def job(**settings: Any) -> Job:
    return Job.model_validate({"source": {"uri": "photos"}, "catalog": {"uri": "c"}, "profile": "starter", **settings})


def test_every_setting_of_a_task_that_is_not_there_is_named() -> None:
    assert unused_settings(job(**ALL, tasks=["embed"])) == (
        "source.text_column (of match)",
        "source.questions_column (of answer)",
        "questions (of answer)",
        "policy (of moderate)",
        "models.caption (of caption)",
        "max_caption_tokens (of caption)",
        "num_beams (of caption)",
    )
    assert unused_settings(job(**ALL, tasks=["embed", "moderate", "caption", "match", "answer"])) == ()
    assert unused_settings(job(tasks=["embed"])) == ()


def test_plan_report_and_doctor_tell_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"x")
    given = job(tasks=["embed"], questions=["what is it?"], policy="demo")
    summary, console = plan(given), Console(record=True, width=200)
    print_plan(summary, console)
    now = dt.datetime.now(dt.UTC)
    told: dict[str, Any] = {"run_id": "r", "source": "s", "catalog": "c", "profile": "p", "tasks": ("embed",)}
    for status in ("done", "nothing_due"):
        report = RunReport(**told, status=status, date=now.date(), started_at=now, unused=summary.unused)
        print_report(report, console)
    words = "set, and read by none of the tasks: questions (of answer), policy (of moderate)"
    assert console.export_text().count(words) == 3
    checks = doctor_of(given)
    next(checks)
    warned = next(checks)
    assert (warned.verdict, warned.found) == ("warn", words)


@pytest.mark.parametrize("command", ["enrich", "plan"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--question", "what is it?"], "--question is for the task answer, and the tasks are embed, moderate, "),
        (["--questions-column", "ask"], "--questions-column is for the task answer"),
        (["--policy", "demo", "--tasks", "embed"], "--policy is for the task moderate, and the tasks are embed"),
        (["--text-column", "title", "--tasks", "embed"], "--text-column is for the task match"),
    ],
)
def test_an_option_for_a_task_that_will_not_run_is_refused(
    command: str, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, str(tmp_path), str(tmp_path / "catalog"), "--profile", "starter", *options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
