"""Exact search finds what a plain product finds, among live rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references
from tests.search_samples import clustered, found, names, nearest, put, unit
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import DataFile, TableLog, TableName
from vlmflow.errors import CatalogError, ConfigError, SearchError
from vlmflow.search import exact
from vlmflow.search import live as live_module
from vlmflow.search.build import update_index
from vlmflow.search.duplicates import find_duplicates
from vlmflow.search.live import LiveRows, _columns_in
from vlmflow.search.query import Query
from vlmflow.search.searcher import Searcher, search_images


def test_the_nearest_over_several_files(tmp_path: Path) -> None:
    images, vectors = names(300), clustered(300)
    for start in range(0, 300, 100):
        put(tmp_path, images[start : start + 100], vectors[start : start + 100], run=f"r{start}")
    result = search_images(config_of(tmp_path), Query(like="mem://i00007"), top_k=12)
    expected = nearest(images, vectors, vectors[7], 13)[1:]
    assert found(result) == expected
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(vectors[images.index(expected[0])] @ vectors[7], abs=1e-6)
    assert (result.num_rows, result.num_matching, result.num_indexed) == (300, 299, 0)


@pytest.mark.parametrize("num_reads", [3, 4], ids=["small files", "large files"])
def test_vectors_of_small_files_come_with_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_reads: int
) -> None:
    images, vectors = names(300), clustered(300)
    for start in range(0, 300, 100):
        put(tmp_path, images[start : start + 100], vectors[start : start + 100], run=f"r{start}")
    live = LiveRows(Folder(config_of(tmp_path)), open_catalog(tmp_path).newest_images)
    wanted = np.zeros(300, np.bool_)
    (at,) = live.find(to_binary(pa.array([image_id(images[150])])))
    wanted[at] = True
    read, paths = Folder.read_parquet, []

    def noted(self: Folder, path: str, columns: Any = None) -> pa.Table:
        paths.append(path)
        return read(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", noted)
    if num_reads == 4:
        monkeypatch.setattr(exact, "_SMALL_BYTES", 0)
    embeddings = TableLog.open(live._folder, "embeddings").refresh()
    ((positions, found_vectors),) = exact.vector_blocks(live._folder, embeddings, live, wanted)
    assert positions.tolist() == [at]
    assert np.array_equal(found_vectors, vectors[150:151])
    assert len(paths) == num_reads


def test_a_condition_over_any_column(tmp_path: Path) -> None:
    images, vectors = names(100), clustered(100)
    decisions = ["block" if number % 4 == 0 else "allow" for number in range(100)]
    titles = [{"title": "red bag" if number % 2 else "blue"} for number in range(100)]
    put(tmp_path, images, vectors, decision=decisions, source=titles)
    where = "decision = 'allow' AND source.title LIKE 'red%'"
    result = search_images(config_of(tmp_path), Query(like="mem://i00000"), where=where, top_k=100)
    assert set(found(result)) == {images[number] for number in range(100) if number % 4 and number % 2}
    assert {hit.decision for hit in result.hits} == {"allow"}


@pytest.mark.parametrize(
    "where", ["nonsense >", "colour = 1", "1); DROP TABLE images; --", "true) UNION SELECT (1", "uri = '\udcff'"]
)
def test_a_condition_that_is_none_is_refused(tmp_path: Path, where: str) -> None:
    put(tmp_path, names(2), clustered(2))
    with pytest.raises(ConfigError, match="condition in SQL"):
        search_images(config_of(tmp_path), Query(like="mem://i00000"), where=where)


def test_only_the_columns_of_a_condition_are_read(tmp_path: Path) -> None:
    put(tmp_path, names(2), clustered(2))
    columns = TableLog.open(Folder(config_of(tmp_path)), "images").refresh().schema
    assert _columns_in("decision = 'allow' AND images.width > 3", columns) == ["image_id", "width", "decision"]
    assert _columns_in("len(labels) > 0", columns) == ["image_id", "labels"]
    assert _columns_in("COLUMNS(*) IS NOT NULL", columns) == columns.names


def test_vectors_that_no_row_refers_to_are_not_found(tmp_path: Path) -> None:
    images, vectors = names(10), clustered(10)
    put(tmp_path, images, vectors, run="killed", with_rows=False)
    put(tmp_path, images, -vectors, run="r1")
    put(tmp_path, images, -vectors, run="r1", with_rows=False)  # the same ones twice
    put(tmp_path, images, vectors, run="r1", view="center", with_rows=False)
    result = search_images(config_of(tmp_path), Query(like="mem://i00003"), top_k=20)
    assert found(result) == nearest(images, -vectors, -vectors[3], 10)[1:]


def test_a_row_without_a_vector_is_not_found(tmp_path: Path) -> None:
    put(tmp_path, names(4), clustered(4), embed_run_id=["r0", None, "r0", "r0"], embed_fingerprint=["model-1"] * 4)
    result = search_images(config_of(tmp_path), Query(like="mem://i00000"))
    assert set(found(result)) == {"i00002", "i00003"}
    with pytest.raises(SearchError, match="no embedding"):
        search_images(config_of(tmp_path), Query(like="mem://i00001"))


def test_rows_of_another_model_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, names(5), clustered(5))
    put(tmp_path, names(3, 5), clustered(3, dim=8), run="r1", model="model-2")
    result = search_images(config_of(tmp_path), Query(like="mem://i00000"))
    assert set(found(result)) == set(names(5)[1:])
    assert result.num_other_model == 3
    assert any("another model" in note for note in result.notes)


def test_vectors_of_two_models_are_found_though_one_file_holds_both(tmp_path: Path) -> None:
    config, small, large = config_of(tmp_path), clustered(12), clustered(6, dim=24)
    put(config, names(6), small[:6], run="r0", model="small")
    put(config, names(6, 6), large, run="r1", model="large")
    put(config, names(6, 12), small[6:], run="r2", model="small")
    Catalog.open(config).compact("c")
    assert len(Catalog.open(config).live_files("embeddings")) == 1
    of_small = [*names(6), *names(6, 12)]
    result = search_images(config, Query(like="mem://i00000"))
    assert found(result) == nearest(of_small[1:], small[1:], small[0], 10)
    result = search_images(config, Query(like="mem://i00006"))
    assert found(result) == nearest(names(5, 7), large[1:], large[0], 10)
    assert update_index(config, min_rows=0).num_covered == 18
    assert found(search_images(config, Query(like="mem://i00006"))) == found(result)
    assert find_duplicates(config, kinds=["semantic"]).num_images == 18


def test_vectors_of_another_length_are_an_error_of_ours(tmp_path: Path) -> None:
    put(tmp_path, names(5), clustered(5))
    put(tmp_path, names(3, 5), clustered(3, dim=8), run="r1")
    with pytest.raises(CatalogError, match="dimensions"):
        search_images(config_of(tmp_path), Query(like="mem://i00000"))


def test_what_was_committed_since_is_found(tmp_path: Path) -> None:
    images, vectors = names(20), clustered(20)
    put(tmp_path, images[:10], vectors[:10])
    searcher = Searcher(config_of(tmp_path))
    assert len(found(searcher.search(Query(like="mem://i00000"), top_k=30))) == 9
    put(tmp_path, images[10:], vectors[10:], run="r1")
    assert found(searcher.search(Query(like="mem://i00000"), top_k=30)) == nearest(images, vectors, vectors[0], 20)[1:]


def test_an_absent_catalog_image_or_query_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no catalog"):
        search_images(config_of(tmp_path / "none"), Query(text="x"))
    put(tmp_path, names(2), clustered(2))
    with pytest.raises(ConfigError, match="is not in"):
        search_images(config_of(tmp_path), Query(like="mem://other"))
    with pytest.raises(ConfigError, match="top_k 0"):
        search_images(config_of(tmp_path), Query(like="mem://i00000"), top_k=0)
    for wrong in ({}, {"text": "a", "like": "b"}, {"text": "  "}):
        with pytest.raises(ConfigError):
            Query(**wrong)


def test_words_that_are_no_valid_text_are_no_bug(tmp_path: Path) -> None:
    put(tmp_path, names(2), clustered(2))
    with pytest.raises(ConfigError, match="is not in"):
        search_images(config_of(tmp_path), Query(like="a\udcff"))


def test_a_catalog_without_rows_finds_nothing(tmp_path: Path) -> None:
    put(tmp_path, names(2), clustered(2), replace=True)
    put(tmp_path, [], np.empty((0, 16), np.float32), run="r1", replace=True)
    folder = Folder(config_of(tmp_path))
    live = LiveRows(folder, TableLog.open(folder, "images").refresh())
    assert len(live) == 0
    assert live.num_by_model == {}
    with pytest.raises(ConfigError, match="is not in"):
        search_images(config_of(tmp_path), Query(like="mem://i00000"))


def test_of_a_new_version_the_new_files_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(config_of(tmp_path))
    log = TableLog.open
    read: list[str] = []
    read_each = live_module.read_each

    def watched(folder: Folder, table: TableName, files: list[DataFile], *rest: Any, **how: Any) -> Any:
        read.extend(file.path for file in files)
        return read_each(folder, table, files, *rest, **how)

    catalog = open_catalog(tmp_path)
    for run, some in (("r9", names(10)), ("r5", names(10, 10)), ("r7", names(10, 20))):
        enrich(catalog, run, [references(some)])
    live = LiveRows(folder, log(folder, "images").refresh())
    enrich(catalog, "r1", [references(names(10, 30))])
    enrich(catalog, "r2", [references(names(5, 8), version="v2")], content="others")  # rewrites two files
    monkeypatch.setattr(live_module, "read_each", watched)
    snapshot = log(folder, "images").refresh()
    newer = LiveRows(folder, snapshot, live)
    assert sorted(read) == sorted(snapshot.files.keys() - {file.path for file in live.files})
    assert (len(read), len(snapshot.files)) == (3, 4)
    anew = LiveRows(folder, snapshot)
    keys = to_binary(pa.array([image_id(name) for name in names(45)]))
    assert (newer.find(keys) == anew.find(keys)).all()
    assert (newer.by_id == anew.by_id).all()
    assert newer.num_by_model == anew.num_by_model
    runs = pa.chunked_array([["r9", "r5", "r7", "r1", "r2"] * 9])
    assert (newer.locate(keys, runs) == anew.locate(keys, runs)).all()
    assert live.find(keys).max() == 29, "the older one stays as it was"


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    put(tmp_path, names(10), unit(np.ones((10, 4))))
    put(tmp_path, names(10, 10), unit(np.ones((10, 4))), run="r1")
    folder = Folder(config_of(tmp_path))
    live = LiveRows(folder, TableLog.open(folder, "images").refresh())
    order = np.array([15, 2, 19, 0, 11])
    whole = [uri for _, rows in live.read(["uri"]) for uri in rows["uri"].to_pylist()]
    assert live.take(order, ["uri"])["uri"].to_pylist() == [whole[row] for row in order]


@pytest.mark.parametrize("block_rows", [7, 64])
def test_of_equal_images_more_of_an_answer_begin_with_the_fewer(block_rows: int) -> None:
    vectors = unit(np.array([[1.0, 0.2], [0.1, 1.0]], np.float32)[np.arange(60) % 2])  # thirty of each
    positions = np.arange(60)
    blocks = [
        (positions[start : start + block_rows], vectors[start : start + block_rows])
        for start in range(0, 60, block_rows)
    ]
    query = np.array([1.0, 0.0], np.float32)
    answers = [exact.search_exact(iter(blocks), query, top_k).positions.tolist() for top_k in range(1, 61)]
    assert answers[-1] == [*range(0, 60, 2), *range(1, 60, 2)]
    assert [answers[-1][: len(answer)] for answer in answers] == answers
