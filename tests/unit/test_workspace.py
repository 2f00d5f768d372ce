"""What is put aside on the local disk: nothing of it stays for ever, and a full disk is told as one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.catalog_samples import config_of, enrich, open_catalog, references, request
from tests.terminal import run
from vlmflow.catalog.folder import Folder
from vlmflow.errors import WorkspaceError
from vlmflow.search.build import _Update, update_index
from vlmflow.search.searcher import Searcher
from vlmflow.workspace import Workspace, in_our_words

KILLED = """
import os, signal
from vlmflow.workspace import Workspace
(Workspace().path / "part").write_bytes(bytes(100))
os.kill(os.getpid(), signal.SIGKILL)
"""
FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from vlmflow.cli import main
main(["plan", sys.argv[1], sys.argv[2], "--profile", "starter", "--tasks", "embed"])
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(("number", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "Free some space")])
def test_what_the_system_has_too_little_of_is_what_to_give_more_of(number: int, remedy: str) -> None:
    with pytest.raises(WorkspaceError, match="the temporary folder") as told, in_our_words():
        raise OSError(number, os.strerror(number))
    assert remedy in told.value.remedy


def test_of_a_killed_process_the_next_removes_it_and_of_a_live_one_nothing(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(place)}, check=False)
    assert done.returncode < 0
    (left,) = place.iterdir()
    with Workspace() as first, Workspace() as second:
        assert not left.exists()
        assert sorted(place.iterdir()) == sorted([first.path, second.path])
    assert list(place.iterdir()) == []


def test_what_searches_and_index_updates_put_aside_is_swept_up_too(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrich(open_catalog(tmp_path / "catalog"), "r1", [references(["a"])])
    config, used = config_of(tmp_path / "catalog"), list[Path]()
    monkeypatch.setattr(_Update, "_update_model", lambda *given: used.append(given[-1]))
    update_index(config, min_rows=0)
    searcher = Searcher(config)
    used += place.iterdir()
    assert [path.name.startswith("vlmflow-workspace-") for path in used] == [True, True]
    del searcher
    assert list(place.iterdir()) == []


def test_what_others_own_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workspace() as of_another:
        (place / "vlmflow-workspace-link").symlink_to(place.parent)
        (place / "vlmflow-workspace-file").touch()
        theirs = place / "vlmflow-workspace-theirs"
        theirs.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        Workspace().close()
        assert of_another.path.exists()
        assert theirs.exists()
        monkeypatch.undo()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        Workspace().close()
        assert not theirs.exists()
        assert len(list(place.iterdir())) == 3


def test_one_that_is_swept_up_before_it_is_locked_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.mkdtemp
    taken: list[Path] = []

    def made_and_gone(**given: str) -> str:
        path = Path(made(**given))  # type: ignore[call-overload]
        if not taken:
            taken.append(path)
            path.rmdir()
        return str(path)

    monkeypatch.setattr(tempfile, "mkdtemp", made_and_gone)
    with Workspace() as workspace:
        assert list(place.iterdir()) == [workspace.path]


def test_a_full_disk_is_named_with_its_remedy(tmp_path: Path, place: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("uri\n" + "".join(f"/nowhere/{number}.jpg\n" for number in range(2000)))
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(listed), str(tmp_path / "catalog")],
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = " ".join(done.stderr.split())
    assert done.returncode == 2, told
    assert f"the temporary folder {place} cannot be used" in told
    assert "File too large" in told
    assert "set TMPDIR" in told
    assert "Traceback" not in told
    assert list(place.iterdir()) == []


def test_a_copy_that_there_is_no_room_for_is_no_fault_of_the_store(tmp_path: Path) -> None:
    folder = Folder(config_of(tmp_path))
    folder.write("indexes/a.faiss", bytes(100))
    with pytest.raises(WorkspaceError, match="No space left on device"):
        folder._download("indexes/a.faiss", Path("/dev/full"))


def test_a_temporary_folder_that_cannot_be_used_is_an_error_of_ours(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    place.rmdir()
    with pytest.raises(WorkspaceError, match="No such file or directory"):
        catalog.plan([references(["a"])], request())
    assert run("verify", str(tmp_path), str(tmp_path / "catalog")) == 2
    assert "the temporary folder" in " ".join(capsys.readouterr().err.split())
