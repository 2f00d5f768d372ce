"""Image ids as keys."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmflow.catalog.keys import (
    concat,
    digest_of,
    duplicates,
    from_bytes,
    index_of,
    text_digests,
    to_binary,
    to_words,
)
from vlmflow.errors import CatalogError

raw_keys = st.lists(st.binary(min_size=16, max_size=16))


@given(raw_keys)
def test_ids_become_the_bytes_they_spell(raw: list[bytes]) -> None:
    keys = to_binary(pa.chunked_array([[key.hex() for key in raw]], pa.string()))
    assert keys.to_pylist() == raw


def test_ids_are_read_from_slices_and_from_several_chunks() -> None:
    ids = [f"{number:032x}" for number in range(10)]
    sliced = pa.array(ids).slice(3, 4)
    assert to_binary(sliced).to_pylist() == [bytes.fromhex(name) for name in ids[3:7]]
    chunked = pa.chunked_array([ids[:2], [], ids[2:]], pa.string())
    assert to_binary(chunked).to_pylist() == [bytes.fromhex(name) for name in ids]


@pytest.mark.parametrize("bad", ["abc", "g" * 32, "A" * 32, "ä" * 16, None])
def test_what_is_no_id_is_refused(bad: str | None) -> None:
    with pytest.raises(CatalogError, match="32 hexadecimal digits"):
        to_binary(pa.array(["0" * 32, bad]))


@given(raw_keys, raw_keys)
def test_an_index_finds_each_key_and_no_other(held: list[bytes], asked: list[bytes]) -> None:
    held = list(dict.fromkeys(held))
    index = index_of(pa.array(held, pa.binary(16)))
    found = index.find(*to_words(pa.array([*asked, *held], pa.binary(16))))
    assert found.tolist() == [held.index(key) if key in held else -1 for key in [*asked, *held]]


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    held = [b"\0" * 8 + bytes([number]) * 8 for number in (3, 1, 2)]
    index = index_of(pa.array(held, pa.binary(16)))
    asked = pa.array([*held, b"\0" * 8 + b"\7" * 8], pa.binary(16))
    assert index.find(*to_words(asked)).tolist() == [0, 1, 2, -1]


def test_a_key_that_is_there_a_hundred_thousand_times_costs_a_search_for_others_nothing() -> None:
    same = np.full((100_000, 16), 7, np.uint8)
    others = np.random.default_rng(0).integers(0, 256, (64, 16), np.uint8)
    index = index_of(from_bytes(np.concatenate([others[:32], same])))
    asked = to_words(from_bytes(np.concatenate([others, same[:1]])))
    started = time.thread_time()
    found = index.find(*asked)
    assert time.thread_time() - started < 0.1  # it took 0.4 s
    assert found.tolist() == [*range(32), *[-1] * 32, 32]


def test_indexes_merge_and_forget() -> None:
    keys = [pa.array([bytes([number]) * 16], pa.binary(16)) for number in range(3)]
    merged = index_of(keys[0], 0).merged([index_of(keys[1], 1), index_of(keys[2], 2)])
    asked = to_words(concat(keys))
    assert merged.find(*asked).tolist() == [0, 1, 2]
    assert merged.kept(merged.values != 1).find(*asked).tolist() == [0, -1, 2]


@given(st.lists(st.integers(0, 5)))
def test_every_repetition_is_marked_and_no_first_one(numbers: list[int]) -> None:
    keys = from_bytes(np.array([[number] * 16 for number in numbers], np.uint8).reshape(-1, 16))
    expected = [number in numbers[:place] for place, number in enumerate(numbers)]
    assert duplicates(keys).tolist() == expected


def test_digests_know_where_a_part_ends() -> None:
    assert digest_of("ab", "c") != digest_of("a", "bc")
    assert len(digest_of("x")) == 32
    digests = text_digests(pa.array(["a", None, "a", "b"]))
    assert digests[0] == digests[2] != digests[3]
    assert digests[1].as_py() is None
