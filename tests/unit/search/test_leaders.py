"""Groups around heads are those of comparing each with each, and dense ones do not take a comparison for each pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.catalog_samples import config_of
from tests.search_samples import MODEL, names, put, unit
from vlmflow.search import alone, leaders, looks, near
from vlmflow.search.build import update_index
from vlmflow.search.index import OpenSegment
from vlmflow.search.leaders import owners_of
from vlmflow.search.looks import MAX_BITS, Looks
from vlmflow.search.near import IndexedVectors, NearVectors
from vlmflow.search.searcher import Searcher

THRESHOLD = 0.95


def by_brute_force(is_near: NDArray[np.bool_]) -> list[int]:
    """The head of each, one after another."""
    owners: list[int] = []
    for item in range(len(is_near)):
        owners.append(next((head for head in range(item) if owners[head] == head and is_near[head, item]), item))
    return owners


def balls(rng: np.random.Generator, count: int, dim: int = 12) -> NDArray[np.float32]:
    """Vectors in clusters, of which some are wider than the threshold reaches, and alone, in any order."""
    sizes = rng.geometric(0.02, count)
    label = np.repeat(np.arange(count), sizes)[:count]
    width = rng.choice([0.05, 0.2, 0.4, 0.6], count)[label, None]
    centres = unit(rng.standard_normal((count, dim)))
    return rng.permutation(unit(centres[label] + width * rng.standard_normal((count, dim)) / np.sqrt(dim)))


def near_hashes(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Hashes a few bits from one of some, in any order; none twice."""
    hashes = rng.integers(0, 1 << 63, 5, np.uint64)[rng.integers(0, 5, 2 * count)]
    for _ in range(5):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, 2 * count, np.uint64))
    return rng.permutation(np.unique(hashes))[:count]


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """How many values each call of a function gives, of its first if it gives several."""
    sizes: list[int] = []
    function = getattr(module, name)

    def wrapper(*values: Any, **options: Any) -> Any:
        found = function(*values, **options)
        sizes.append(np.size(found[0] if isinstance(found, tuple) else found))
        return found

    monkeypatch.setattr(module, name, wrapper)
    return sizes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 16, 64, 1_024])
def test_groups_are_those_of_each_compared_with_each(seed: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaders, "_WINDOW", window)
    monkeypatch.setattr(near, "_OTHERS", 37)
    monkeypatch.setattr(looks, "_MAX_CELLS", (1, 50, 1 << 20)[seed % 3])
    rng = np.random.default_rng(seed)
    vectors = balls(rng, 300)
    expected = by_brute_force(vectors @ vectors.T >= THRESHOLD)
    assert 20 < len(set(expected)) < 280
    assert owners_of(NearVectors(vectors, THRESHOLD)).tolist() == expected

    hashes = near_hashes(rng, 300)
    expected = by_brute_force(np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= MAX_BITS)
    assert 20 < len(set(expected)) < 280
    assert owners_of(Looks(hashes)).tolist() == expected


def test_nothing_has_no_groups() -> None:
    assert owners_of(NearVectors(np.empty((0, 4), np.float32), THRESHOLD)).tolist() == []
    assert owners_of(Looks(np.empty(0, np.uint64))).tolist() == []


def indexed(root: Path, vectors: NDArray[np.float32], **sizes: int) -> tuple[NDArray[np.float32], list[OpenSegment]]:
    """Vectors as a catalog has them, and its index of them."""
    count = len(vectors)
    put(root, names(count), vectors)
    update_index(config_of(root), min_rows=0, **sizes)
    searcher = Searcher(config_of(root))
    searcher.refresh()
    ((positions, stored),) = searcher.vectors(MODEL, np.ones(count, np.bool_))
    assert positions.tolist() == list(range(count))
    return stored, searcher.covering(MODEL, np.ones(count, np.bool_))


def test_vectors_that_have_none_near_them_are_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3_000
    rng = np.random.default_rng(1)
    vectors = unit(rng.standard_normal((count, 64)))  # all unlike
    vectors[:200] = unit(vectors[np.arange(200) % 40] + 0.02 * rng.standard_normal((200, 64)))  # in groups of five
    stored, segments = indexed(tmp_path, rng.permutation(vectors), segment_rows=2_000)
    assert len(segments) == 2
    for module, name, size in ((alone, "_QUERIES", 700), (alone, "_ROWS", 50), (alone, "_OTHERS", 30)):
        monkeypatch.setattr(module, name, size)

    looked_up = IndexedVectors(stored, THRESHOLD, segments, np.arange(count))
    for number, segment in enumerate(segments):
        held = np.flatnonzero(segment.segment.positions >= 0)
        items, cells = segment.segment.positions[held], segment.cells_of(stored, near._PROBES)
        holding = np.full(count, -1)
        for cell in range(segment.num_cells):
            holding[segment.segment.positions[segment.places_in(cell)]] = cell
        assert sorted(items) == np.flatnonzero(holding >= 0).tolist()
        is_in = (cells[:, :, None] == holding[None, None, :]).any(axis=1)
        is_near = (stored @ stored.T >= THRESHOLD) & is_in & ~np.eye(count, dtype=np.bool_)
        assert looked_up._have_near[number].tolist() == is_near.any(axis=1).tolist()
        assert 50 < is_near.any(axis=1).sum() <= 200

    asked: list[int] = []
    function = OpenSegment.neighbours

    def neighbours(self: OpenSegment, queries: NDArray[np.float32], *given: Any) -> Any:
        asked.append(len(queries))
        return function(self, queries, *given)

    monkeypatch.setattr(OpenSegment, "neighbours", neighbours)
    owners = owners_of(looked_up)
    assert 0 < sum(asked) < 1_000
    monkeypatch.setattr(near, "have_near", lambda *_: np.ones(count, np.bool_))
    assert owners.tolist() == owners_of(IndexedVectors(stored, THRESHOLD, segments, np.arange(count))).tolist()
    assert len(set(owners.tolist())) < count - 100


def test_a_dense_group_is_not_compared_pair_by_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4_000  # in one group: eight million pairs
    monkeypatch.setattr(leaders, "_WINDOW", 64)
    rng = np.random.default_rng(0)
    # One that is wider than the threshold reaches, around a middle that is near to all.
    width = np.where(rng.random(count) < 0.2, 0.35, 0.05)[:, None]
    vectors = unit(unit(np.ones(16)) + width * unit(rng.standard_normal((count, 16))))
    stored, segments = indexed(tmp_path, vectors)
    found = counted(monkeypatch, OpenSegment, "neighbours")

    owners = owners_of(IndexedVectors(stored, THRESHOLD, segments, np.arange(count)))

    is_same = owners == owners_of(NearVectors(stored, THRESHOLD))
    assert is_same.mean() >= 0.95, "of a group in 256 cells"
    assert count <= sum(found) <= 8 * count, "those that are taken are not found again"

    hashes = np.unique(np.uint64(0xF0F0) ^ (np.uint64(1) << rng.integers(0, 64, (2, count), np.uint64)).sum(axis=0))
    assert len(hashes) > 1_000
    compared = counted(monkeypatch, np, "bitwise_count")
    assert len(set(owners_of(Looks(hashes)).tolist())) < 100
    assert sum(compared) < len(hashes) ** 2 / 4
