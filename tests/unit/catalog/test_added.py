"""The keys that have come into a table since planning."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmflow.catalog import added as added_module
from vlmflow.catalog.added import AddedKeys
from vlmflow.catalog.log import DataFile, Snapshot


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys(numbers: list[int]) -> pa.Array:
    return pa.array([key(number) for number in numbers], pa.binary(16))


def snapshot(paths: set[str]) -> Snapshot:
    files = {path: DataFile(path, 1, 1, dt.date(2026, 1, 1)) for path in paths}
    return Snapshot(1, 1, files, pa.schema([]))


@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.none(), max_size=6).map(set), min_size=1))
def test_keys_are_found_in_the_files_that_live_now(versions: list[set[str]]) -> None:
    """Files come, go and come back; a file's keys are its letter's."""
    held = {letter: [10 * number, 10 * number + 1] for number, letter in enumerate("abcdefgh")}
    reads: list[str] = []

    def read(path: str) -> pa.Array:
        reads.append(path)
        return keys(held[path])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(added_module, "_MAX_RECENT", 2)
        index = AddedKeys(frozenset("a"), read)
        for live in versions:
            index.refresh(snapshot(live))
            for letter, numbers in held.items():
                found = [index.path(number) if number >= 0 else None for number in index.locate(keys(numbers)).tolist()]
                assert found == ([letter] * 2 if letter in live and letter != "a" else [None] * 2)


def test_keys_that_were_told_are_not_read() -> None:
    def read(path: str) -> pa.Array:
        raise AssertionError(path)

    index = AddedKeys(frozenset(), read)
    index.tell("mine", keys([1, 2]))
    index.refresh(snapshot({"mine"}))
    assert index.locate(keys([2, 3])).tolist() == [0, -1]
