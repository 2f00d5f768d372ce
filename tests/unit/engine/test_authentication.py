"""The token of an embedded Ray in containers whose home folder cannot keep it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmflow.config import RayConfig
from vlmflow.engine import cluster
from vlmflow.engine.authentication import ensure_token


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path / "file" / "home")})
    (tmp_path / "file").touch()  # so that not even root can put a folder there
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)


def test_ray_gets_a_token_where_it_could_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **_: found.append(os.environ["RAY_AUTH_TOKEN"]))
    cluster._connect(RayConfig())
    del os.environ["RAY_AUTH_TOKEN"]
    cluster._connect(RayConfig())
    assert len(set(found)) == 2
    assert min(map(len, found)) == 64


def test_a_cluster_by_its_address_has_the_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    cluster._connect(RayConfig(address="head:6379"))
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_ray_gets_a_token_where_nobody_has_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    del os.environ["HOME"]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("has_one", [True, False])
def test_a_home_folder_keeps_the_token(tmp_path: Path, has_one: bool) -> None:
    os.environ["HOME"] = str(tmp_path)
    if has_one:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("theirs")
    ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_given_stays(name: str) -> None:
    os.environ[name] = "theirs"
    ensure_token()
    assert (os.environ[name], "RAY_AUTH_TOKEN" in os.environ) == ("theirs", name == "RAY_AUTH_TOKEN")
