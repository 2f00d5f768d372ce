"""What is absent is told apart from what cannot be looked at, on every Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmflow.paths import is_file, is_folder, is_there


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    found = {
        name: (is_there(tmp_path / name), is_file(tmp_path / name), is_folder(tmp_path / name))
        for name in ("file", "link", "dangling", "round", "nothing", "file/in it", "nu\0ll")
    }
    absent = (False, False, False)
    assert found == dict.fromkeys(found, absent) | {"file": (True, True, False), "link": (True, False, True)}


@pytest.mark.parametrize("look", [is_there, is_file, is_folder])
def test_what_cannot_be_looked_at_is_not_absent(look: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(look)
    with pytest.raises(OSError, match="too long"):
        look(tmp_path / ("x" * 300))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.stat", refuse)
    with pytest.raises(PermissionError):
        look(tmp_path)
