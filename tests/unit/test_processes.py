"""What tests start ends with them."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from tests.processes import started


def test_what_a_process_has_started_ends_though_it_ended_itself_before(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid)"
    with started([sys.executable, "-c", code], tmp_path / "log") as process:
        assert process.wait(60) == 0
        left = psutil.Process(int((tmp_path / "log").read_text()))
        assert left.is_running()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
