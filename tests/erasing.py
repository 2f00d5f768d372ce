"""What tests of erasure share: keys of sample images, every byte of a catalog, and another process's turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import image_id
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog.keys import to_binary

NAMES = ["a", "b", "secret"]


def key(*names: str) -> pa.Array:
    return to_binary(pa.array([image_id(name) for name in names], pa.string()))


def everything(root: Path) -> str:
    """Every byte of the folder, Parquet files as their values, as one text."""
    parts = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            parts.append(path.name)
            data = path.read_bytes()
            parts.append(data.decode("latin-1"))
            if path.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    parts.append(repr(file.read().to_pylist()))
                    parts.append(repr(file.metadata.to_dict()))
    return "\n".join(parts)


def everything_of(path: Path) -> str:
    with pq.ParquetFile(path) as file:
        rows = file.read().to_pylist()
    return repr([[value.hex() if isinstance(value, bytes) else value for value in row.values()] for row in rows])


def at_write(monkeypatch: pytest.MonkeyPatch, turn: int, action: Callable[[], object]) -> None:
    """Does something else between the decision and the writing of the commit with this number."""
    original = commit_module._write
    calls: list[int] = []

    def write_later(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == turn:
            action()
        original(*arguments)

    monkeypatch.setattr(commit_module, "_write", write_later)
