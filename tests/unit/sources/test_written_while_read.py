"""Files that somebody writes into while they are read: their bytes are those of one version, the one that is noted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pytest

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import RowErrorClass
from vlmflow.sources import open_source
from vlmflow.sources.base import Fetched
from vlmflow.storage import local_version

OLD, NEW = b"a" * 4096, b"b" * 4096


class Shared:
    """A file in whose place another process writes, between two halves of each reading, as often as it is told to."""

    def __init__(self, file: BinaryIO, path: Path, writes: Iterator[Callable[[Path], object]]) -> None:
        self._file, self._path, self._writes = file, path, writes

    def read(self, count: int) -> bytes:
        first = self._file.read(len(OLD) // 2)
        next(self._writes, lambda _: None)(self._path)
        os.lseek(self._file.fileno(), len(first), os.SEEK_SET)
        return first + os.read(self._file.fileno(), count - len(first))

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *how: Any) -> None:
        self._file.__exit__(*how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def overwrite(path: Path) -> None:
    before = path.stat().st_mtime_ns
    with open(path, "r+b") as file:  # noqa: PTH123 - Path.open is the reader's here
        file.write(NEW)
    os.utime(path, ns=(before + 1, before + 1))  # the clock of a file system has steps of milliseconds


def replace(path: Path) -> None:
    beside = path.with_name("beside")
    with open(beside, "wb") as file:  # noqa: PTH123
        file.write(NEW)
    beside.replace(path)


def read(folder: Path, writes: list[Callable[[Path], object]], monkeypatch: pytest.MonkeyPatch) -> Fetched:
    (folder / "a.jpg").write_bytes(OLD)
    source = open_source(SourceConfig(uri=str(folder)))
    rows = pa.Table.from_batches(list(source.list()))
    opened, left = Path.open, iter(writes)

    def shared(path: Path, mode: str) -> Any:
        return Shared(opened(path, mode, buffering=0), path, left)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", shared)
    (found,) = source.reader(ImageLimits()).read(rows)
    return found


def test_what_is_overwritten_in_place_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, [overwrite], monkeypatch)
    assert (found.data, found.object_version) == (NEW, local_version((tmp_path / "a.jpg").stat()))


def test_what_is_replaced_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, [replace], monkeypatch)
    assert found.data == OLD
    assert found.object_version != local_version((tmp_path / "a.jpg").stat()), "so the next run reads the new one"


def test_what_is_written_all_the_time_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, [overwrite] * 10, monkeypatch)
    assert (found.data, found.error_class) == (None, RowErrorClass.READ_FAILED)
    assert "writing" in found.message
