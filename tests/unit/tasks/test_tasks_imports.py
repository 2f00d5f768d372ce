"""A driver that only plans does not pay for torch."""

from __future__ import annotations

import subprocess
import sys


def test_settling_a_job_s_tasks_imports_no_torch() -> None:
    code = "import sys, vlmflow.tasks.setup; print(sorted({'torch', 'transformers', 'open_clip'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
