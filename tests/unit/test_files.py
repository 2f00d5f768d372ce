"""Files that a user names: what was there stays until all of the new one is written."""

from __future__ import annotations

import datetime as dt
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from vlmflow.cli.files import write_output
from vlmflow.errors import ConfigError, PolicyError, ReviewError
from vlmflow.files import put_file
from vlmflow.gate import GoldenImage, GoldenValues, write_accepted
from vlmflow.moderation.policy import load_policy, shipped_policies, write_binding, write_version
from vlmflow.moderation.review_files import write_queue

# In the middle of the file.
KILLED = """
import pathlib, resource, signal, sys
from vlmflow.moderation.policy import load_policy, shipped_policies, write_version
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
write_version(shipped_policies()["demo"], pathlib.Path(sys.argv[1]), load_policy("demo").bindings[0])
"""
KILLED_ANYWHERE = """
import os, pathlib, signal, sys
from vlmflow.files import put_file
def lines():
    yield "half"
    os.kill(os.getpid(), signal.SIGKILL)
put_file(pathlib.Path(sys.argv[1]), lines())
"""


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _bound(path: Path) -> None:
    write_binding(path, load_policy("demo").bindings[0].model_copy(update={"weights": "f" * 64}))


def _accepted(path: Path) -> None:
    image = GoldenImage(name="a", status="ok", caption=None, decision="allow", margins={})
    now = dt.datetime.now(dt.UTC)
    write_accepted(
        path, GoldenValues(made_at=now, profile="starter", policy=None, fingerprints={}, images={"a": image})
    )


@pytest.mark.parametrize("write", [_bound, _accepted, lambda path: write_output(path, iter(["new", "er"]))])
def test_a_full_disk_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.yaml"
    path.write_bytes(shipped_policies()["demo"].read_bytes())
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises((PolicyError, ConfigError), match="No space left on device"):
        write(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
    monkeypatch.undo()
    write(path)
    assert path.read_bytes() != before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_a_full_disk_leaves_a_queue_that_somebody_filled_in(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"queue{suffix}"
    path.write_text("filled in")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(ReviewError, match="No space left on device"):
        write_queue(path, pa.table({"uri": ["a"], "image_id": ["a"]}))
    assert path.read_text() == "filled in"


def test_half_a_new_version_of_a_policy_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output, binding = shipped_policies()["demo"], tmp_path / "new.yaml", load_policy("demo").bindings[0]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _full)
        with pytest.raises(PolicyError, match="No space left on device"):
            write_version(source, output, binding)
    assert [*tmp_path.iterdir()] == []
    done = subprocess.run([sys.executable, "-c", KILLED, str(output)], check=False)
    assert done.returncode == -signal.SIGXFSZ
    assert not output.exists()
    assert write_version(source, output, binding).name == "demo"
    with pytest.raises(PolicyError, match="is there already"):
        write_version(source, output, binding)


def test_mode_and_link_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    put_file(link, "new\r\n")
    assert link.is_symlink()
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    plain = tmp_path / "plain"
    plain.write_text("")
    put_file(tmp_path / "new", b"new")
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode


def test_what_a_kill_leaves_of_a_file_goes_with_the_next_an_hour_later(tmp_path: Path) -> None:
    path = tmp_path / "of [mine].csv"
    done = subprocess.run([sys.executable, "-c", KILLED_ANYWHERE, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = {tmp_path / name for name in (f".{path.name}.part", f".another.{left.suffixes[-2][1:]}.part")}
    for other in others:
        other.touch()
        os.utime(other, (0, 0))
    put_file(path, "new")
    assert {*tmp_path.iterdir()} == {path, left, *others}, "somebody may be at it"
    os.utime(left, (time.time() - 3601,) * 2)
    put_file(path, "newer")
    assert {*tmp_path.iterdir()} == {path, *others}


def test_where_nothing_can_take_its_place_a_file_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old, and longer")

    def refused(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refused)
    put_file(path, "new")
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    put_file(pipe, "through")
    reader.join()
    assert read == ["through"]
