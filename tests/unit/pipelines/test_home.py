"""Prefect's folder in containers that have no home folder, or one that cannot be written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import command_line, home
from pipelines.home import is_usable, settle_home
from vlmflow.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path / "file" / "home")})
    (tmp_path / "file").touch()  # so that not even root can put a folder there
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.environ.pop("PREFECT_HOME", None)
    os.environ.pop("PREFECT_PROFILES_PATH", None)


def test_prefect_gets_a_folder_of_this_user_alone(tmp_path: Path) -> None:
    settle_home()
    folder = Path(os.environ["PREFECT_HOME"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "PREFECT_PROFILES_PATH" not in os.environ
    settle_home()
    assert Path(os.environ["PREFECT_HOME"]) == folder


def test_profiles_of_a_home_that_is_read_only_still_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["HOME"] = str(tmp_path)
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "profiles.toml").touch()
    monkeypatch.setattr(home, "is_usable", lambda _: False)  # which root cannot have
    settle_home()
    assert os.environ["PREFECT_HOME"] == str(tmp_path / f"vlmflow-prefect-{os.geteuid()}")
    assert os.environ["PREFECT_PROFILES_PATH"] == str(tmp_path / ".prefect" / "profiles.toml")


def test_a_user_without_a_home_folder_gets_the_one_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without an entry in /etc/passwd, and no HOME: Prefect cannot be imported."""
    del os.environ["HOME"]
    monkeypatch.setattr(home, "is_usable", lambda _: False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    settle_home()
    assert os.environ["HOME"] == "/"
    assert "PREFECT_HOME" in os.environ


@pytest.mark.parametrize("name", ["HOME", "PREFECT_HOME"])
def test_a_folder_that_is_there_stays(tmp_path: Path, name: str) -> None:
    os.environ[name] = str(tmp_path)
    settle_home()
    assert os.environ.get("PREFECT_HOME") == (str(tmp_path) if name == "PREFECT_HOME" else None)


def test_a_folder_that_another_has_put_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"vlmflow-prefect-{os.geteuid()}").symlink_to(tmp_path / "theirs")
    settle_home()
    assert "PREFECT_HOME" not in os.environ


def test_a_folder_that_cannot_be_made_is_not_usable(tmp_path: Path) -> None:
    assert not is_usable(tmp_path / "file" / "home")
    assert is_usable(tmp_path / "new" / "home")


def test_a_flow_without_a_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary server would end in the traceback of its database."""
    server = SimpleNamespace(ephemeral=SimpleNamespace(enabled=True, startup_timeout_seconds=1))
    settings = SimpleNamespace(home=tmp_path / "file", api=SimpleNamespace(url=None), server=server)
    monkeypatch.setattr(command_line, "get_current_settings", lambda: settings)
    with pytest.raises(ConfigError, match="cannot be written to") as refused:
        command_line._start_server()
    assert str(tmp_path / "file") in str(refused.value)
    assert "PREFECT_HOME" in refused.value.remedy
