"""A process that was told to end does, whatever waits in it for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT

# As a signal leaves it that comes between the two halves of `with`: at exit, Python waits for the thread.
WAITS = """
import logging, signal, threading
from pipelines.ending import end_within

end_within({seconds}, 130)
logging._lock.acquire()
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGHUP)
threading.Thread(target=logging.getLogger("new").isEnabledFor, args=(10,)).start()
{more}
"""


@pytest.mark.parametrize(
    ("seconds", "more", "code"), [(0.2, "", 130), (1000, "logging._lock.release(); raise SystemExit(3)", 3)]
)
def test_it_ends_by_force_where_it_would_not_by_itself_and_told_again_changes_nothing(
    seconds: float, more: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITS.format(seconds=seconds, more=more)], cwd=ROOT, check=False, timeout=60
    )
    assert done.returncode == code
