"""Groups of duplicates and the ranking of titles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import config_of
from tests.search_samples import clustered, names, put, unit
from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.masks import Mask
from vlmflow.errors import ConfigError, SearchError
from vlmflow.search import duplicates
from vlmflow.search.build import FEWEST_ROWS, update_index
from vlmflow.search.duplicates import Kind, find_duplicates
from vlmflow.search.exact import Block
from vlmflow.search.index import HALF_ERROR
from vlmflow.search.leaders import Nearness, owners_of
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.looks import MAX_BITS
from vlmflow.search.searcher import Searcher
from vlmflow.search.titles import find_titles


def groups_of(root: Path, **options: object) -> list[tuple[str, list[str]]]:
    report = find_duplicates(config_of(root), **options)  # type: ignore[arg-type]
    return [(group.kind, [member.uri.removeprefix("mem://") for member in group.members]) for group in report.groups]


def turned(*degrees: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    angles = np.radians(degrees)
    return unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))


def test_equal_bytes_are_one_group_with_the_largest_first(tmp_path: Path) -> None:
    hashes, sides = ["x", "x", "y", "x", None], [10, 30, 10, 20, None]
    put(tmp_path, names(5), clustered(5), content_hash=hashes, width=sides, height=sides)
    report = find_duplicates(config_of(tmp_path), kinds=["exact"])
    assert [group.kind for group in report.groups] == ["exact"]
    assert report.groups[0].representative.uri == "mem://i00001"
    assert [member.uri for member in report.groups[0].members] == ["mem://i00001", "mem://i00003", "mem://i00000"]
    assert (report.num_images, report.num_duplicates) == (4, 2)
    assert report.threshold is None, "no semantic groups were asked for"


def test_no_chain_of_small_steps_joins_what_is_unlike(tmp_path: Path) -> None:
    # Ten degrees apart each: neighbours are alike, the ends are not.
    sides = [9, 8, 7, 6, 5]
    put(tmp_path, names(5), turned(0, 10, 20, 30, 90), width=sides, height=sides)
    assert groups_of(tmp_path, threshold=np.cos(np.radians(11))) == [
        ("semantic", ["i00000", "i00001"]),
        ("semantic", ["i00002", "i00003"]),
    ]


def test_a_group_of_equal_bytes_takes_part_once(tmp_path: Path) -> None:
    put(tmp_path, names(4), turned(0, 0, 1, 90), content_hash=["x", "x", "y", "z"], width=[9, 8, 7, 6], height=[9] * 4)
    assert groups_of(tmp_path) == [("exact", ["i00000", "i00001"]), ("semantic", ["i00000", "i00002"])]
    report = find_duplicates(config_of(tmp_path), kinds=["semantic"])
    assert [round(member.similarity, 3) for member in report.groups[0].members] == [1.0, 1.0]


def test_models_are_not_compared_with_each_other(tmp_path: Path) -> None:
    put(tmp_path, names(2), turned(0, 50))
    put(tmp_path, names(2, 2), turned(0, 50), run="r1", model="model-2")
    assert groups_of(tmp_path) == []


def test_a_condition_narrows_the_images(tmp_path: Path) -> None:
    put(tmp_path, names(3), turned(0, 0, 0), decision=["allow", "block", "allow"], width=[3, 2, 1], height=[1] * 3)
    assert groups_of(tmp_path, where="decision = 'allow'") == [("semantic", ["i00000", "i00002"])]
    with pytest.raises(ConfigError, match=r"--threshold 1\.5"):
        find_duplicates(config_of(tmp_path), threshold=1.5)


def test_the_index_finds_the_groups_that_comparing_all_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(1500, dim=32, centres=300)
    vectors[700:900] = unit(vectors[:200] + 0.02 * np.random.default_rng(3).standard_normal((200, 32)))
    put(tmp_path, names(1500), vectors)
    expected = groups_of(tmp_path)
    assert sum(len(members) for _, members in expected) >= 400
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 100)
    with pytest.raises(SearchError, match=r"1,500 of 1,500 images are not in the index"):
        groups_of(tmp_path)
    update_index(config_of(tmp_path), min_rows=0)
    found = groups_of(tmp_path)
    assert len({tuple(sorted(m)) for _, m in found} & {tuple(sorted(m)) for _, m in expected}) >= 0.97 * len(expected)


@pytest.mark.parametrize("are_equal", [False, True])
def test_without_an_index_no_more_vectors_are_read_than_tell_that_they_are_too_many(
    are_equal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 10)
    for number in range(6):
        rows = turned(*[0] * 8) if are_equal else clustered(8, seed=number)
        put(tmp_path, names(8, 8 * number), rows, run=f"r{number}")
    vectors, num_read = Searcher.vectors, 0

    def counted(self: Searcher, model: str, wanted: Mask) -> Iterator[Block]:
        nonlocal num_read
        for positions, block in vectors(self, model, wanted):
            num_read += len(block)
            yield positions, block

    monkeypatch.setattr(Searcher, "vectors", counted)
    if are_equal:  # however many rows have them: they are compared once
        assert [len(members) for _, members in groups_of(tmp_path)] == [48]
        return
    with pytest.raises(SearchError, match=r"48 of 48 images are not in the index"):
        groups_of(tmp_path)
    assert num_read == 16


def test_equal_vectors_reach_a_threshold_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((1000, 64)))
    vectors[500:600] = vectors[:100]
    # Nearer than half precision can tell, and yet not equal.
    vectors[600:700] = unit(vectors[:100] + 0.002 * np.random.default_rng(1).standard_normal((100, 64)))
    put(tmp_path, names(1000), vectors)
    expected = [("semantic", [f"i{number:05d}", f"i{number + 500:05d}"]) for number in range(100)]
    for least_for_index in (duplicates.ALL_PAIRS, 100):
        monkeypatch.setattr(duplicates, "ALL_PAIRS", least_for_index)
        assert sorted((kind, sorted(members)) for kind, members in groups_of(tmp_path, threshold=1.0)) == expected
        update_index(config_of(tmp_path), min_rows=0)


def test_a_pair_that_half_precision_tells_from_one_side_alone_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, least = np.random.default_rng(0), 0.95 + HALF_ERROR
    first = unit(random.standard_normal((600, 32)))
    aside = random.standard_normal(first.shape)
    aside = unit(aside - (aside * first).sum(axis=1, keepdims=True) * first)
    cosines = least + random.uniform(-1e-4, 1e-4, (600, 1))
    put(tmp_path, names(1200), np.concatenate([first, unit(cosines * first + np.sqrt(1 - cosines**2) * aside)]))
    expected = groups_of(tmp_path)
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 100)
    update_index(config_of(tmp_path), min_rows=0)
    assert sorted(groups_of(tmp_path)) == sorted(expected)
    assert find_duplicates(config_of(tmp_path)).num_duplicates == len(expected) == 600


def test_as_many_images_as_get_no_index_are_compared_each_with_each() -> None:
    assert duplicates.ALL_PAIRS >= FEWEST_ROWS - 1, "else the remedy, to make an index, would do nothing"


@pytest.mark.parametrize("kinds", [["semantical"], [], "exact"])
def test_a_kind_that_there_is_not_is_told_of_and_not_taken_for_no_duplicates(tmp_path: Path, kinds: list[Kind]) -> None:
    put(tmp_path, ["a"], clustered(1))
    with pytest.raises(ConfigError, match="kinds") as caught:
        find_duplicates(config_of(tmp_path), kinds=kinds)
    assert "exact, perceptual, semantic" in caught.value.remedy


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items are compared with each other, each time."""
    counts: list[int] = []

    def wrapper(nearness: Nearness) -> Positions:
        counts.append(len(nearness))
        return owners_of(nearness)

    monkeypatch.setattr(duplicates, "owners_of", wrapper)
    return counts


@pytest.mark.parametrize("has_index", [False, True])
def test_equal_vectors_are_not_compared_with_each_other(
    has_index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank images, of which no perceptual hash is taken."""
    compared = counted(monkeypatch)
    vectors = turned(*[0] * 40, *[1] * 40, *[90] * 40, 180)
    vectors[:20] += np.float32(1e-8)  # by the batch they were in
    put(tmp_path, names(121), vectors)
    if has_index:
        monkeypatch.setattr(duplicates, "ALL_PAIRS", 1)
        update_index(config_of(tmp_path), min_rows=0)
    for threshold, sizes in ((0.95, [80, 40]), (1.0, [40, 40, 40])):
        report = find_duplicates(config_of(tmp_path), threshold=threshold)
        assert [len(group.members) for group in report.groups] == sizes
    assert compared == [0, 4, 0, 4], "looks that there are none of, and vectors"


def test_titles_are_ranked_by_how_little_they_fit(tmp_path: Path) -> None:
    source = [{"title": f"title {n}", "note": f"note {n}"} for n in range(4)]
    digests = [digest_of("title 0"), digest_of("note 1"), digest_of("an older title"), None]
    scores = [0.9, 0.1, 0.5, None]
    put(tmp_path, names(4), clustered(4), source=source, text_digest=digests, text_itm=scores, text_itc=[0.1] * 4)
    report = find_titles(config_of(tmp_path), top_k=10)
    assert [(title.uri, title.text_column, title.text) for title in report.titles] == [
        ("mem://i00001", "note", "note 1"),
        ("mem://i00002", None, None),
        ("mem://i00000", "title", "title 0"),
    ]
    assert report.num_scored == 3
    assert [title.rank for title in find_titles(config_of(tmp_path), top_k=1, where="text_itm > 0.2").titles] == [1]


def test_titles_of_a_model_without_a_matching_head_are_ranked_by_their_cosines(tmp_path: Path) -> None:
    cosines = [0.31, None, 0.05, 0.22]
    put(tmp_path, names(4), clustered(4), text_itc=cosines, match_fingerprint=["siglip"] * 4)
    report = find_titles(config_of(tmp_path))
    assert [(title.uri[-1], title.text_itm, title.text_itc) for title in report.titles] == [
        ("2", None, pytest.approx(0.05)),
        ("3", None, pytest.approx(0.22)),
        ("0", None, pytest.approx(0.31)),
    ]
    assert (report.ranked_by, report.num_scored, report.num_left_out) == ("text_itc", 3, 0)
    assert find_titles(config_of(tmp_path), where="text_itc > 1").titles == ()


def test_scores_that_do_not_compare_are_not_ranked_together(tmp_path: Path) -> None:
    """Cosines of two models, and beside probabilities."""
    models = ["siglip", "clip", "siglip", "siglip", "clip", "blip"]
    cosines = [0.1, 0.2, 0.0, None, 0.3, 0.4]
    put(tmp_path, names(6), clustered(6), text_itc=cosines, match_fingerprint=models, text_itm=[None] * 5 + [0.9])
    report = find_titles(config_of(tmp_path))
    assert [title.uri[-1] for title in report.titles] == ["5"]
    assert (report.ranked_by, report.num_scored, report.num_left_out) == ("text_itm", 1, 4)
    report = find_titles(config_of(tmp_path), where="match_fingerprint != 'blip'")
    assert [title.uri[-1] for title in report.titles] == ["2", "0"]
    assert (report.ranked_by, report.num_scored, report.num_left_out) == ("text_itc", 2, 2)
    report = find_titles(config_of(tmp_path), where="match_fingerprint = 'clip'")
    assert [title.uri[-1] for title in report.titles] == ["1", "4"]


def test_a_catalog_without_match_scores_is_said(tmp_path: Path) -> None:
    put(tmp_path, names(2), clustered(2))
    with pytest.raises(SearchError, match="no row"):
        find_titles(config_of(tmp_path))


def test_images_that_look_alike_are_one_group_by_few_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 63, 40, np.uint64)
    # Each with a copy in which up to four bits differ, wherever they are, and one in which five do.
    near = [
        int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, n % 5, replace=False)) for n, value in enumerate(base)
    ]
    far = [int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, 5, replace=False)) for value in base]
    hashes = [f"{value:016x}" for value in [*base.tolist(), *near, *far]]
    count = len(hashes)
    sides = [30] * 40 + [20] * 40 + [10] * 40
    put(tmp_path, names(count + 1), clustered(count + 1), phash=[*hashes, None], width=[*sides, 5], height=[*sides, 5])

    report = find_duplicates(config_of(tmp_path), kinds=["perceptual"])

    found = {group.representative.uri: [member.uri for member in group.members[1:]] for group in report.groups}
    for number in range(40):
        pair = found[f"mem://i{number:05d}"]
        assert f"mem://i{number + 40:05d}" in pair
        assert f"mem://i{number + 80:05d}" not in pair
    for group in report.groups:
        for member in group.members[1:]:
            bits = bin(
                int(hashes[int(group.representative.uri[-5:])], 16) ^ int(hashes[int(member.uri[-5:])], 16)
            ).count("1")
            assert member.similarity == pytest.approx(1 - bits / 64)
            assert bits <= MAX_BITS
    assert len({uri for uris in found.values() for uri in uris}) == sum(len(uris) for uris in found.values())


class Hashes:
    """Live rows of which only the perceptual hashes are known."""

    def __init__(self, hashes: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        self._rows = pa.table({"phash": [f"{value:016x}" for value in hashes.tolist()]})

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def read(self, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
        yield 0, self._rows.select(names)


def look_alikes(
    hashes: np.ndarray[tuple[int], np.dtype[np.uint64]], ranks: np.ndarray[Any, Any]
) -> list[tuple[list[int], list[float]]]:
    live = cast(LiveRows, Hashes(hashes))
    groups = duplicates._look_alikes(live, np.ones(len(hashes), np.bool_), ranks)
    return [(rows.tolist(), scores.tolist()) for rows, scores in groups]


def test_hashes_compared_once_give_the_groups_of_all_pairs() -> None:
    rng = np.random.default_rng(7)
    # A few bits on either side of three hashes: many are equal, many near, and all that differ in the same bits.
    hashes = rng.integers(0, 1 << 63, 3, np.uint64)[rng.integers(0, 3, 200)]
    for _ in range(4):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 12, 200, np.uint64)) * rng.integers(0, 2, 200, np.uint64)
    ranks = rng.permutation(200)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected: dict[int, list[tuple[float, int]]] = {}
    for row in np.argsort(ranks).tolist():
        head = next((head for head in expected if bits[head, row] <= MAX_BITS), row)
        expected.setdefault(head, []).append((-float(1 - bits[head, row] / 64), row))
    groups = {head: [row for _, row in sorted(members[1:])] for head, members in expected.items() if len(members) > 1}
    assert len(groups) > 3

    found = look_alikes(hashes, ranks)
    assert {rows[0]: rows[1:] for rows, _ in found} == groups
    for rows, scores in found:
        assert scores == (1 - bits[rows[0], rows] / 64).tolist()


def test_images_of_one_look_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.full(300, 3 << 62, np.uint64)
    hashes[290:] += np.arange(10, dtype=np.uint64)
    compared = counted(monkeypatch)
    assert [len(rows) for rows, _ in look_alikes(hashes, np.arange(300)[::-1])] == [300]
    assert compared == [10]


def test_hashes_of_plain_images_tell_nothing() -> None:
    hashes = np.array([1 << 63, 1 << 63, 0, 0, 5 << 60, 5 << 60], np.uint64)
    assert [rows for rows, _ in look_alikes(hashes, np.arange(6))] == [[4, 5]]
