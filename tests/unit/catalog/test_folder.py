"""Parquet files of the catalog's folder: read piece by piece, and named where they are damaged."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow as pa
import pytest
from obstore.exceptions import NotSupportedError

from tests.catalog_samples import config_of
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import files_holding
from vlmflow.catalog.keys import index_of
from vlmflow.errors import CatalogError

NUM_ROWS = 1000
ROWS = pa.table(
    {
        "name": [f"image {number}" for number in range(NUM_ROWS)],
        "name2": pa.array(range(NUM_ROWS)),
        "labels": [[{"label": "cat", "score": number / 7}] * (number % 3) for number in range(NUM_ROWS)],
        "vector": [[float(number)] * 4 for number in range(NUM_ROWS)],
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(config_of(tmp_path))


def ways_to_read(folder: Folder) -> list[Callable[[], pa.Table]]:
    return [
        lambda: folder.read_parquet("a.parquet"),
        lambda: folder.read_parquet("a.parquet", ["name", "labels"]),
        lambda: folder.read_parquet_at("a.parquet", ["name", "labels"], np.array([900, 3]), OrderedDict(), 4),
    ]


@pytest.mark.parametrize("columns", [[], ["name"], ["vector", "labels"], ["name2", "name"]])
def test_columns_are_read_as_from_the_whole_file(folder: Folder, columns: Sequence[str]) -> None:
    folder.write_parquet("a.parquet", ROWS, row_group_size=300)
    read = folder.read_parquet("a.parquet", columns)
    assert read.num_rows == NUM_ROWS
    assert read.select(columns).equals(ROWS.select(columns))
    found = folder.read_parquet_at("a.parquet", ["labels"], np.array([900, 3, 3]), OrderedDict(), 4)
    assert found.equals(ROWS.select(["labels"]).take([900, 3, 3]))


def test_a_footer_longer_than_the_first_request_is_read(folder: Folder) -> None:
    wide = pa.table({f"column {number} {'x' * 100}": ["a", "b"] for number in range(500)})
    folder.write_parquet("wide.parquet", wide)
    wanted = wide.column_names[7:9]
    assert folder.read_parquet("wide.parquet", wanted).equals(wide.select(wanted))


def test_a_small_file_is_read_with_one_request(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog of years has a file or two for each night."""
    folder.write_parquet("a.parquet", ROWS)
    asked: list[str] = []
    for name in ("get", "head", "get_range", "get_ranges"):
        original = getattr(obstore, name)

        def noted(*args: Any, _name: str = name, _original: Any = original, **given: Any) -> Any:
            asked.append(_name)
            return _original(*args, **given)

        monkeypatch.setattr(obstore, name, noted)
    for read in ways_to_read(folder):
        read()
    assert asked == ["get"] * 3


def test_a_store_that_gives_no_end_of_a_file_is_asked_for_its_size(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = obstore.get

    def without(*args: Any, options: Any = None) -> Any:
        if options is not None:
            raise NotSupportedError("Azure does not support suffix range requests")
        return get(*args)

    monkeypatch.setattr(obstore, "get", without)
    folder.write_parquet("a.parquet", ROWS, row_group_size=100)
    assert folder.read_parquet("a.parquet", ["vector"]).equals(ROWS.select(["vector"]))


def _cut(data: bytes) -> bytes:
    return data[:-20]


def _empty(_: bytes) -> bytes:
    return b""


def _pages_overwritten(data: bytes) -> bytes:
    return data[:4] + b"\xff" * 12_000 + data[12_004:]


def _name_overwritten(data: bytes) -> bytes:
    return data.replace(b"vector", b"vec\xaaor")


def _offsets_overwritten(data: bytes) -> bytes:
    return data[:-5000] + bytes(4000) + data[-1000:]


@pytest.mark.parametrize("damage", [_cut, _empty, _pages_overwritten, _name_overwritten, _offsets_overwritten])
def test_a_damaged_file_is_called_that(folder: Folder, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """And not a store that is out of reach, which would be tried again night after night."""
    folder.write_parquet("a.parquet", ROWS, row_group_size=300)
    file = tmp_path / "a.parquet"
    file.write_bytes(damage(file.read_bytes()))
    for read in ways_to_read(folder):
        with pytest.raises(CatalogError, match=r"a\.parquet is damaged") as info:
            read()
        assert info.value.exit_code == 2
        assert info.value.remedy.startswith("Restore the file")


def test_a_damaged_file_of_an_index_may_hold_any_image(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "indexes").mkdir()
    (tmp_path / "indexes" / "a.parquet").write_bytes(b"PAR1 half a file")
    wanted = index_of(pa.array([bytes(16)], pa.binary(16)))
    assert files_holding(folder, wanted) == ["indexes/a.faiss", "indexes/a.parquet"]


def test_no_thread_of_arrows_frees_memory_of_pythons(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would abort a program that ends meanwhile."""
    freed: Counter[bool] = Counter()

    class Piece(bytes):
        def __bytes__(self) -> bytes:
            return Piece(self + b"")

        def __del__(self) -> None:
            freed[threading.current_thread() is threading.main_thread()] += 1

    class Answer:
        def __init__(self, answer: Any) -> None:
            self._answer = answer

        @property
        def meta(self) -> Any:
            return self._answer.meta

        def bytes(self) -> Piece:
            return Piece(self._answer.bytes())

    get, get_range, get_ranges = obstore.get, obstore.get_range, obstore.get_ranges
    monkeypatch.setattr(obstore, "get", lambda *args, **given: Answer(get(*args, **given)))
    monkeypatch.setattr(obstore, "get_range", lambda *args, **given: Piece(get_range(*args, **given)))
    monkeypatch.setattr(obstore, "get_ranges", lambda *args, **given: [*map(Piece, get_ranges(*args, **given))])
    folder.write_parquet("a.parquet", ROWS, row_group_size=100)
    for _ in range(20):
        for read in ways_to_read(folder):
            read()
    assert freed[True] >= 60
    assert not freed[False]
