"""The watchdog ends a process that hangs in C code, says where, and costs next to nothing otherwise."""

from __future__ import annotations

import faulthandler
import subprocess
import sys

import pytest

from vlmflow.engine.watchdog import at_most

HANGS = """
import re
from vlmflow.engine import watchdog
{before}
def hanging():
    re.findall(r"(a+)+$", "a" * {length} + "b")
with watchdog.at_most({seconds}):
    hanging()
print("came back")
"""


def run(**given: object) -> subprocess.CompletedProcess[str]:
    values = {"before": "", "length": 60, "seconds": 0.3} | given
    command = [sys.executable, "-c", HANGS.format(**values)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_process_that_hangs_ends_and_says_where() -> None:
    ended = run()
    assert ended.returncode == 1
    assert "in hanging" in ended.stderr
    assert "came back" not in ended.stdout


def test_what_returns_in_time_is_left_alone() -> None:
    assert run(length=5, seconds=60).stdout == "came back\n"


def test_it_can_be_switched_off() -> None:
    assert run(before="watchdog.disable()", length=22, seconds=0.0001).stdout == "came back\n"


def test_the_timer_is_set_anew_only_where_another_block_is_to_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda left, **_: told.append(f"in {round(left)} s"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: told.append("never"))
    with at_most(60.0):
        assert told == ["in 60 s"]
        with at_most(90.0), at_most(100.0):
            pass
        assert told == ["in 60 s"]
        with at_most(30.0):
            assert told == ["in 60 s", "in 30 s"]
        assert told == ["in 60 s", "in 30 s", "in 60 s"]
    assert told == ["in 60 s", "in 30 s", "in 60 s", "never"]
