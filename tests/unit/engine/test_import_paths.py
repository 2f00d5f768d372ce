"""Workers look for modules where the driver does: not in whatever folder somebody works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from vlmflow.engine.import_paths import own_import_paths


def told(folders: list[str]) -> list[str]:
    """What workers are told, when Ray adds these."""
    config = own_import_paths()
    config._py_driver_sys_path.extend(folders)
    return list(config._get_proto_job_config().py_driver_sys_path)


def test_the_working_folder_is_one_of_them_where_the_driver_looks_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/venv/bin", "/venv/lib"])
    assert told(["/venv/bin", str(tmp_path)]) == ["/venv/bin"], "as of the command"
    for own in ("", ".", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [own, "/venv/lib"])
        assert told(["/elsewhere", str(tmp_path)]) == [str(tmp_path)], (
            "as of an interpreter, a notebook, or `python -m`"
        )


@pytest.mark.slow
def test_a_module_in_the_working_folder_ends_no_worker(tmp_path: Path) -> None:
    for name in ("types.py", "random.py", "PIL.py"):
        (tmp_path / name).write_text(f"raise SystemExit('{name} was run')")
    script = "import sys; sys.path.pop(0); from vlmflow.cli import main; main()"
    source = ROOT / "vlmflow" / "starter" / "demo"
    command = [sys.executable, "-c", script, "enrich", str(source), "catalog", "--profile", "starter", "--limit", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 images" in done.stdout
