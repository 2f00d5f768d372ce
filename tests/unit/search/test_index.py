"""The index: as good as exact search, never behind the tables, and without what was erased."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, image_id
from tests.s3 import S3Server
from tests.search_samples import MODEL, clustered, found, names, nearest, put, recall
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import TableLog
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError, ConfigError
from vlmflow.search import build, segments
from vlmflow.search import index as ivf
from vlmflow.search.build import update_index
from vlmflow.search.live import LiveRows
from vlmflow.search.query import Query
from vlmflow.search.results import SearchResult
from vlmflow.search.searcher import Searcher, search_images

COUNT = 2000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "catalog", names(COUNT), clustered(COUNT))
    return tmp_path / "catalog"


def ask(root: Path, number: int, **options: Any) -> SearchResult:
    return search_images(config_of(root), Query(like=f"mem://i{number:05d}"), **options)


def index_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "indexes").rglob("*") if path.is_file())


def key(*images: str) -> pa.Array:
    return to_binary(pa.array([image_id(name) for name in images], pa.string()))


def test_it_finds_what_exact_search_finds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "PROBES", 16)  # of some 170 cells
    report = update_index(config_of(root), min_rows=0, segment_rows=800)
    assert (report.num_rows, report.num_covered, report.num_added, report.num_segments) == (COUNT, COUNT, COUNT, 3)
    vectors, images = clustered(COUNT), names(COUNT)
    results = {number: ask(root, number) for number in range(0, COUNT, 50)}
    assert all(result.num_indexed == COUNT - 1 for result in results.values())
    truth = {number: nearest(images, vectors, vectors[number], 11)[1:] for number in results}
    assert recall({number: found(result) for number, result in results.items()}, truth) >= 0.95
    score = results[50].hits[0].score
    assert score == pytest.approx(vectors[images.index(found(results[50])[0])] @ vectors[50], abs=1e-3)


def test_a_rare_condition_costs_no_recall(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "PROBES", 2)
    update_index(config_of(root), min_rows=0)
    vectors, images = clustered(COUNT), names(COUNT)
    rare = [number for number in range(COUNT) if number % 100 == 7]
    for number in (0, 400, 1999):
        order = nearest([images[at] for at in rare], vectors[rare], vectors[number], 10)
        assert found(ask(root, number, where="uri LIKE '%07'")) == order
    assert ask(root, 0, where="uri = 'none'").hits == ()


def test_rows_that_it_does_not_cover_are_found_and_said(root: Path) -> None:
    update_index(config_of(root), min_rows=0)
    more, vectors = names(100, COUNT), clustered(100, seed=1)
    put(root, more, vectors, run="r1")
    everything = np.concatenate([clustered(COUNT), vectors])
    result = ask(root, COUNT + 3, top_k=5)
    assert result.num_indexed == COUNT
    assert "covers 2,000 of 2,099 images" in result.notes[0]
    expected = nearest(names(COUNT + 100), everything, everything[COUNT + 3], 6)[1:]
    assert len(set(found(result)) & set(expected)) >= 4
    before = index_files(root)
    report = update_index(config_of(root), min_rows=0)
    assert (report.num_added, report.num_covered, report.num_segments) == (100, COUNT + 100, 2)
    assert set(before) < set(index_files(root))  # those that were there are left alone
    assert ask(root, COUNT + 3).notes == ()
    assert update_index(config_of(root), min_rows=0).num_added == 0


def test_replaced_rows_are_found_by_their_new_vectors_alone(root: Path) -> None:
    update_index(config_of(root), min_rows=0)
    images, old = names(COUNT), clustered(COUNT)
    new = old.copy()
    new[:100] = clustered(100, seed=5)
    runs = ["r1"] * 100 + ["r0"] * (COUNT - 100)
    put(root, images[:100], new[:100], run="r1", with_rows=False)
    put(root, images, old, run="r0", embed_run_id=runs, replace=True)
    result = ask(root, 150, top_k=COUNT)
    assert len(found(result)) == len(set(found(result))) == COUNT - 1
    by_name = {hit.uri.removeprefix("mem://"): hit.score for hit in result.hits}
    for number in range(100):
        assert by_name[images[number]] == pytest.approx(new[number] @ old[150], abs=1e-3)
    report = update_index(config_of(root), min_rows=0)
    assert (report.num_added, report.num_covered) == (100, COUNT)


def test_segments_that_hold_mostly_what_is_gone_or_are_many_are_written_anew(root: Path) -> None:
    update_index(config_of(root), min_rows=0)
    first = index_files(root)
    put(root, names(COUNT // 4), clustered(COUNT // 4), run="r0", replace=True)
    report = update_index(config_of(root), min_rows=0)
    assert (report.num_added, report.num_covered, report.num_segments) == (COUNT // 4, COUNT // 4, 1)
    assert not set(first) & set(index_files(root))
    for number in range(1, 9):
        put(root, names(50, 10_000 * number), clustered(50, seed=number), run=f"n{number}")
        report = update_index(config_of(root), min_rows=0)
    assert report.num_segments <= 2
    assert report.num_covered == COUNT // 4 + 400


def test_cells_are_found_anew_when_the_catalog_has_grown(root: Path) -> None:
    put(root, names(300), clustered(300), run="r0", replace=True)
    update_index(config_of(root), min_rows=0)
    put(root, names(COUNT), clustered(COUNT), run="r0", replace=True)
    report = update_index(config_of(root), min_rows=0)
    assert (report.num_added, report.num_segments) == (COUNT, 1)


def test_an_open_searcher_uses_an_index_that_is_made_meanwhile(root: Path) -> None:
    searcher, query = Searcher(config_of(root)), Query(like="mem://i00001")
    assert searcher.search(query).num_indexed == 0
    update_index(config_of(root), min_rows=0)
    assert searcher.search(query).num_indexed == COUNT - 1
    for path in index_files(root):
        path.unlink()
    assert searcher.search(query).num_indexed == 0


def test_what_another_update_is_writing_stays_until_it_has_ended(root: Path) -> None:
    half = root / "indexes" / MODEL / "half.parquet"  # its rows: the vectors come last
    half.parent.mkdir(parents=True)
    half.write_bytes(b"begun")
    with Catalog.open(config_of(root)).runs.recorded("index"):
        assert update_index(config_of(root), min_rows=0).num_covered == COUNT
    assert half.exists()
    assert update_index(config_of(root), min_rows=0).num_removed >= 1
    assert not half.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said() -> None:
    index = ivf.train(clustered(600), 8)
    index.add(clustered(600))
    with pytest.raises(ConfigError, match="cannot be written to /dev: No space left on device") as refused:
        ivf.save(index, Path("/dev/full"))
    assert "TMPDIR" in refused.value.remedy


def test_small_catalogs_get_none(root: Path) -> None:
    report = update_index(config_of(root))
    assert (report.num_small, report.num_segments) == (COUNT, 0)
    assert index_files(root) == []


@pytest.mark.parametrize("harm", ["cut", "gone", "garbage", "rows"])
def test_a_damaged_index_is_passed_over_and_repaired(root: Path, harm: str) -> None:
    update_index(config_of(root), min_rows=0)
    vectors = next(path for path in index_files(root) if path.suffix == ".faiss")
    rows = next(path for path in index_files(root) if path.suffix == ".parquet")
    match harm:
        case "cut":
            vectors.write_bytes(vectors.read_bytes()[:500])
        case "gone":
            vectors.unlink()
        case "garbage":
            vectors.write_bytes(b"\xff" * vectors.stat().st_size)
        case "rows":
            rows.write_bytes(b"PAR1 not really")
    if harm == "garbage":  # of the right size: only the library can tell
        with pytest.raises(CatalogError, match=str(vectors.relative_to(root))) as refused:
            ask(root, 3)
        assert "--build-index` puts a new one in its place" in refused.value.remedy
        assert ask(root, 3, exact=True).num_indexed == 0
        assert update_index(config_of(root), min_rows=0).num_damaged == 1
        assert ask(root, 3).num_indexed == COUNT - 1
        return
    result = ask(root, 3)
    assert result.num_indexed == 0
    assert found(result) == nearest(names(COUNT), clustered(COUNT), clustered(COUNT)[3], 11)[1:]
    assert update_index(config_of(root), min_rows=0).num_covered == COUNT
    assert len(index_files(root)) == 2


@pytest.mark.parametrize("config", ["local", "s3"])
@pytest.mark.parametrize("version", ["of now", "before checksums"])
def test_an_update_finds_damage_that_leaves_the_size_as_it_was(
    config: str, version: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = config_of(tmp_path / "catalog")
    if config == "s3":
        place = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    put(place, names(400), clustered(400))
    if version == "before checksums":
        monkeypatch.setattr(build, "checksum_of", lambda _: None)
    report = update_index(place, min_rows=0, segment_rows=250)
    assert (report.num_segments, report.num_damaged) == (2, 0)
    monkeypatch.undo()
    folder = Folder(place)
    paths = [file.path for file in folder.list("indexes") if file.path.endswith(".faiss")]
    data = bytearray(folder.read(paths[0]) or b"")
    if version == "of now":
        data[len(data) // 2] ^= 1  # no library can tell
    else:
        data[:4] = b"\xff" * 4
    folder.write(paths[0], bytes(data))
    report = update_index(place, min_rows=0, segment_rows=250)
    assert (report.num_damaged, report.num_segments, report.num_covered) == (1, 2, 400)
    assert {file.path for file in folder.list("indexes")} & {*paths} == {paths[1]}
    assert update_index(place, min_rows=0, segment_rows=250).num_damaged == 0


def test_places_that_no_row_has_are_told_as_damage(root: Path) -> None:
    update_index(config_of(root), min_rows=0)
    vectors = next(path for path in index_files(root) if path.suffix == ".faiss")
    size = vectors.stat().st_size
    index = ivf.emptied(vectors, "index")
    index.add_with_ids(clustered(COUNT), np.arange(COUNT) * 7)
    ivf.save(index, vectors)
    assert vectors.stat().st_size == size
    folder = Folder(config_of(root))
    live = LiveRows(folder, TableLog.open(folder, "images").refresh())
    (segment,) = segments.read_index(folder, live, tuple(live.num_by_model)).segments
    opened = ivf.OpenSegment(segment, vectors)
    for search in (
        lambda: opened.search(clustered(COUNT)[1999], 3, None),
        lambda: opened.neighbours(clustered(COUNT)[1990:], 0.5, np.ones(COUNT, np.bool_), 16),
        lambda: [opened.places_in(cell) for cell in range(opened.num_cells)],
    ):
        with pytest.raises(CatalogError, match=f"index file {vectors.relative_to(root)} cannot be read"):
            search()


def test_erasure_empties_the_index(root: Path) -> None:
    update_index(config_of(root), min_rows=0, segment_rows=500)
    before = index_files(root)
    result = Catalog.open(config_of(root)).erase(key("i00042"))
    assert result.is_complete
    assert result.num_index_files == 2
    left = index_files(root)
    assert len(left) == len(before) - 2
    secret = clustered(COUNT)[42].astype(np.float16).tobytes()
    assert not any(secret in path.read_bytes() for path in left)
    assert any(secret in path.read_bytes() for path in rebuilt_with(root, "i00042"))
    answer = ask(root, 41, top_k=COUNT)
    assert "i00042" not in found(answer)
    assert len(answer.hits) == COUNT - 2
    assert update_index(config_of(root), min_rows=0).num_covered == COUNT - 1


def rebuilt_with(root: Path, name: str) -> list[Path]:
    """An index elsewhere that holds the image: shows that the search for its bytes finds them where they are."""
    other = root.parent / "other"
    put(other, names(COUNT), clustered(COUNT))
    update_index(config_of(other), min_rows=0)
    assert name in names(COUNT)
    return index_files(other)


def test_an_image_erased_while_the_index_is_made_stays_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = segments.write_segment
    results = []

    def erase_first(*arguments: Any) -> str:
        results.append(Catalog.open(config_of(root)).erase(key("i00042")))
        return original(*arguments)

    monkeypatch.setattr(build, "write_segment", erase_first)
    update_index(config_of(root), min_rows=0)
    assert not results[0].is_complete  # a run is at work: ask again
    assert index_files(root) == []
    monkeypatch.undo()
    assert Catalog.open(config_of(root)).erase(key("i00042")).is_complete
    assert update_index(config_of(root), min_rows=0).num_covered == COUNT - 1


def test_vectors_of_which_nobody_knows_whose_they_are_go_too(root: Path) -> None:
    update_index(config_of(root), min_rows=0)
    next(path for path in index_files(root) if path.suffix == ".parquet").unlink()
    assert Catalog.open(config_of(root)).erase(key("i00042")).num_index_files == 1
    assert index_files(root) == []


def test_no_cell_stands_for_a_single_image(root: Path) -> None:
    vectors = clustered(600)
    vectors[0] = -vectors[1:].mean(axis=0) / np.linalg.norm(vectors[1:].mean(axis=0))
    index = ivf.train(vectors, 32)
    centres = index.quantizer.reconstruct_n(0, index.nlist)
    assert (centres @ vectors[0]).max() < 0.999


def test_without_the_library_it_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_index(config_of(root), min_rows=0)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match="faiss"):
        ask(root, 1)
    assert len(ask(root, 1, exact=True).hits) == 10


def test_on_a_store(s3_server: S3Server) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    images, vectors = names(400), clustered(400)
    put(config, images, vectors)
    assert update_index(config, min_rows=0).num_covered == 400
    put(config, names(10, 400), clustered(10, seed=1), run="r1")
    assert update_index(config, min_rows=0).num_added == 10
    searcher, query = Searcher(config), Query(like="mem://i00000")
    result = searcher.search(query, top_k=5)
    assert result.num_indexed == 409
    everything = np.concatenate([vectors, clustered(10, seed=1)])
    assert found(result) == nearest([*images, *names(10, 400)], everything, vectors[0], 6)[1:]
    copies = {path: path.stat().st_mtime_ns for path in searcher._workspace.path.iterdir()}
    assert len(copies) == 2
    put(config, names(1, 500), clustered(1, seed=2), run="r2")
    assert searcher.search(query).num_rows == 411
    assert {path: path.stat().st_mtime_ns for path in copies} == copies, "a segment was downloaded again"
    assert Catalog.open(config).erase(key("i00001")).num_index_files == 2
    searcher.refresh()
    assert [path.exists() for path in copies].count(True) == 1, "erased vectors are on this disk"
    assert searcher.search(query).num_indexed == 10
