"""Commits: made once, on the newest snapshot, whatever other writers and the store do. On local disk and on S3."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from tests.catalog_samples import enrich, image_id, on_both_stores, references, request, rows_by_name, write
from vlmflow import retry as retry_module
from vlmflow.catalog import Catalog
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import history as history_module
from vlmflow.catalog import log as log_module
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.history import COMMIT_ID
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import Snapshot, TableLog
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.runs import LONG_AGO
from vlmflow.catalog.writer import write_file
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError, CommitError, TransientError

NAMES = [f"image {number}" for number in range(6)]


@on_both_stores
def test_a_commit_made_twice_is_made_once(catalog: Catalog, config: CatalogConfig) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    assert not catalog.commit("r1", files).repeated
    enrich(catalog, "r2", [references(["more"])])
    versions = catalog.version, catalog.embeddings(["view"]).num_rows
    assert catalog.commit("r1", files).repeated
    assert Catalog.open(config).commit("r1", files).repeated
    assert (catalog.version, catalog.embeddings(["view"]).num_rows) == versions
    staged = write(catalog, "r3", [references(NAMES, version="v2")], content="new")
    assert catalog.commit("r3", staged).num_replaced == len(NAMES)
    catalog.compact("r4")
    assert catalog.commit("r3", staged).repeated
    assert len(rows_by_name(catalog)) == len(NAMES) + 1


def test_a_commit_of_which_nothing_was_left_is_made_once_too(catalog: Catalog, config: CatalogConfig) -> None:
    """All its images were erased since: what it wrote of them is deleted, and cannot be decided on again."""
    enrich(catalog, "r0", [references(NAMES)])
    staged = write(catalog, "r1", [references(NAMES[:2], version="v2")], content="new")
    erased = to_binary(pa.array([image_id(name) for name in NAMES[:2]], pa.string()))
    catalog.erase(erased)
    assert catalog.commit("r1", staged).num_erased == 2
    catalog.lift(erased)
    again = Catalog.open(config).commit("r1", staged)
    assert (again.repeated, again.num_added, again.num_replaced) == (True, 0, 0)
    assert sorted(rows_by_name(catalog)) == sorted(NAMES[2:])


@on_both_stores
def test_a_commit_whose_answer_was_lost_is_found_in_the_log(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    made = commit_module._write

    def lose_the_answer(*args: object) -> None:
        monkeypatch.setattr(commit_module, "_write", made)
        made(*args)  # type: ignore[arg-type]
        raise OSError("connection reset")

    monkeypatch.setattr(commit_module, "_write", lose_the_answer)
    result = catalog.commit("r1", files)
    assert (result.num_added, result.num_conflicts, result.repeated) == (len(NAMES), 1, False)
    assert len(rows_by_name(catalog)) == len(NAMES)


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("table", ["images", "embeddings", "swap"])
def test_live_files_stay_when_another_run_commits_while_a_lost_answer_is_looked_for(
    catalog: Catalog, config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, table: str, found: bool
) -> None:
    """``found``: the log is asked and says so; otherwise it is wrong, and still nothing that is live is deleted."""
    enrich(catalog, "r0", [references(NAMES[:2])])
    other = Catalog.open(config)
    theirs = write(other, "r2", [references(NAMES[4:])])
    ours = write(catalog, "r1", [references(NAMES[2:4])])
    (old,) = catalog.live_files("images").values()
    rows = read_rows(Folder(config), "images", old)
    new = write_file(Folder(config), "images", rows, old.ingest_date, "r1")
    made, was_committed = commit_module._write, TableLog.was_committed
    wanted = "embeddings" if table == "embeddings" else "images"

    def lose_the_answer(handle: DeltaTable, *args: object) -> None:
        made(handle, *args)  # type: ignore[arg-type]
        if wanted in handle.table_uri:
            monkeypatch.setattr(commit_module, "_write", made)
            monkeypatch.setattr(TableLog, "was_committed", look)
            raise OSError("connection reset")

    def look(log: TableLog, commit_id: str, since: int) -> bool:
        monkeypatch.setattr(TableLog, "was_committed", was_committed)
        other.commit("r2", theirs)
        return was_committed(log, commit_id, since) if found else False

    monkeypatch.setattr(commit_module, "_write", lose_the_answer)
    if table == "swap":
        assert catalog.swap_images("r1", "test", [(old, new)]) == ([] if found else [old])
    elif found or table == "images":
        assert catalog.commit("r1", ours).num_added == (2 if found else 0)
    else:  # the same file twice is refused
        with pytest.raises(CommitError, match="is already in version"):
            catalog.commit("r1", ours)
    ours_are_in = table == "images" or (table == "embeddings" and found)
    expected = NAMES if ours_are_in else NAMES[:2] + NAMES[4:]
    assert sorted(rows_by_name(catalog)) == expected
    assert catalog.embeddings().num_rows == 2 * len(expected)


def test_a_conflict_is_decided_anew_on_the_newest_snapshot(catalog: Catalog, config: CatalogConfig) -> None:
    """Another run commits between our look at the table and our commit."""
    other = Catalog.open(config)
    ours = write(catalog, "r1", [references(NAMES[:4])])
    theirs = iter([write(other, "r2", [references(NAMES[3:5])]), write(other, "r3", [references(NAMES[5:])])])
    with interrupted(lambda: [other.commit("other", files) for files in [next(theirs, None)] if files]):
        result = catalog.commit("r1", ours)
    assert result.num_conflicts >= 1
    assert (result.num_added, result.num_dropped) == (3, 1)
    assert sorted(rows_by_name(catalog)) == sorted(NAMES)


def test_two_replacements_of_one_file_both_count(catalog: Catalog, config: CatalogConfig) -> None:
    enrich(catalog, "r0", [references(NAMES)], request(["embed"]))
    other = Catalog.open(config)
    ours = write(catalog, "r1", [references(NAMES)], request(["embed", "moderate"]))
    theirs = write(other, "r2", [references(NAMES)], request(["caption"]))
    with interrupted(once(lambda: other.commit("r2", theirs))):
        assert catalog.commit("r1", ours).num_replaced == len(NAMES)
    rows = rows_by_name(catalog)
    assert {(row["caption"], row["decision"], row["embed_run_id"]) for row in rows.values()} == {
        ("a cat", "allow", "r1")
    }


def test_a_commit_that_always_loses_says_so(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    monkeypatch.setattr(commit_module, "MAX_ATTEMPTS", 2)

    def lose(*_: object) -> None:
        raise CommitFailedError("lost")

    monkeypatch.setattr(commit_module, "_write", lose)
    with pytest.raises(CommitError, match="other writers won 2 times"):
        catalog.commit("r1", files)
    assert rows_by_name(catalog) == {}


def test_a_store_that_fails_again_and_again_is_not_tried_for_ever(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    tries: list[int] = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise OSError("connection reset by peer")

    monkeypatch.setattr(commit_module, "_write", fail)
    with pytest.raises(TransientError):
        catalog.commit("r1", files)
    assert len(tries) == commit_module.MAX_FAULTS
    monkeypatch.undo()
    assert catalog.commit("r1", files).num_added == len(NAMES)


def test_a_store_that_is_lost_between_two_looks_at_a_table_is_told_in_our_words(
    catalog: Catalog, config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost:
        def __init__(self, *_: object, **__: object) -> None:
            raise OSError("Generic S3 error: connection refused")

        is_deltatable = __init__

    enrich(catalog, "r1", [references(["another"])])
    files = write(catalog, "r2", [references(NAMES)])
    monkeypatch.setattr(retry_module, "ATTEMPTS", 1)
    monkeypatch.setattr(log_module, "DeltaTable", Lost)
    with pytest.raises(TransientError, match="out of reach"):
        catalog.commit("r2", files)
    with pytest.raises(TransientError, match="out of reach"):
        Catalog.exists(config)
    monkeypatch.undo()
    assert catalog.commit("r2", files).num_added == len(NAMES)


def test_the_log_is_read_once_for_commit_ids(catalog: Catalog, config: CatalogConfig) -> None:
    log = TableLog.open(Folder(config), "images")
    for number in range(3):
        enrich(catalog, f"r{number}", [references([f"n{number}"])])
    ids = [entry[COMMIT_ID] for entry in catalog._images.table.history(3)]
    log.refresh()
    assert [log.was_committed(name, 0) for name in ids] == [True] * 3
    assert [log.was_committed(name, 1) for name in ids] == [True, True, False]
    enrich(catalog, "r9", [references(["more"])])
    log.refresh()
    (newest,) = catalog._images.table.history(1)
    assert log.was_committed(newest[COMMIT_ID], 3)
    assert log.was_committed(ids[-1], 0)
    assert not log.was_committed("other", 0)
    catalog._images.table.create_checkpoint()
    for number in range(3):  # as deltalake does after 30 days
        Folder(config).delete(f"images/_delta_log/{number:020d}.json")
    assert log.was_committed(ids[-1], 0)  # read before
    anew = TableLog.open(Folder(config), "images")
    assert anew.was_committed(newest[COMMIT_ID], 3)
    with pytest.raises(CatalogError, match="the log of table images does not hold version 1 any more") as info:
        anew.was_committed("other", 0)
    assert info.value.remedy == "Run the same command again: it begins at the newest version."


def test_versions_are_counted_up_to_the_handle_however_far_the_log_is(catalog: Catalog, config: CatalogConfig) -> None:
    enrich(catalog, "r1", [references(NAMES[:1])])
    log = TableLog.open(Folder(config), "images")
    for number in range(1, 4):
        enrich(catalog, f"r{number + 1}", [references(NAMES[number : number + 1])])
    assert [log.first_commit_of(run, LONG_AGO) for run in ("r1", "r2", "r4")] == [1, None, None]
    log.refresh()
    assert [log.first_commit_of(run, LONG_AGO) for run in ("r1", "r2", "r4")] == [1, 2, 4]


def test_entries_from_before_a_run_are_not_read_for_its_first_commit(
    catalog: Catalog, config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_LOOKED_AT_ONCE", 2)
    for number in range(1, 7):
        enrich(catalog, f"r{min(number, 5)}", [references([f"n{number}"])])
    started_at = {number: dt.datetime(2026, 11, 20 + number, tzinfo=dt.UTC) for number in range(7)}
    folder = Folder(config)
    for number, at in started_at.items():
        path = f"images/_delta_log/{number:020d}.json"
        entry = (folder.read(path) or b"").decode()
        assert '"timestamp":' in entry
        folder.write(path, re.sub(r'"timestamp":\d+', f'"timestamp":{at.timestamp() * 1000:.0f}', entry).encode())
    for run, first, since, read in (
        ("r5", 5, 5, {3, 4, 5, 6}),
        ("r2", 2, 2, {*range(7)}),
        ("r9", None, 6, {3, 4, 5, 6}),
    ):
        log = TableLog.open(folder, "images")
        assert log.first_commit_of(run, started_at[since]) == first
        assert log.history._notes.keys() == read


@on_both_stores
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_not_as_written_is_not_committed(catalog: Catalog, config: CatalogConfig, damage: str) -> None:
    files = write(catalog, "r1", [references(NAMES)])
    path = files.filter(pc.equal(files["table"], "images"))["path"][0].as_py()
    folder = Folder(config)
    if damage == "gone":
        folder.delete(path)
    else:
        folder.write(path, (folder.read(path) or b"")[:-10])
    with pytest.raises(CommitError, match="does not exist" if damage == "gone" else "bytes, not") as caught:
        catalog.commit("r1", files)
    is_elsewhere = damage == "gone" and "://" not in config.uri  # on the disk of another node, perhaps
    assert ("at the same path" in caught.value.remedy) == is_elsewhere
    assert rows_by_name(catalog) == {}


def test_the_same_image_twice_in_one_commit_is_one_row(catalog: Catalog) -> None:
    once_, twice = (write(catalog, "r1", [references(NAMES)]) for _ in range(2))
    result = catalog.commit("r1", pa.concat_tables([once_, twice]))
    assert (result.num_added, result.num_dropped) == (len(NAMES), len(NAMES))
    assert len(rows_by_name(catalog)) == len(NAMES)
    assert catalog.embeddings().num_rows == 2 * len(NAMES)
    staged, again = (write(catalog, "r2", [references(NAMES, version="v2")], content="two") for _ in range(2))
    assert catalog.commit("r2", pa.concat_tables([staged, again])).num_replaced == len(NAMES)
    assert catalog.embeddings().num_rows == 2 * len(NAMES)


def test_stopped_between_the_tables_and_done_again(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are in, image rows are not: the run is gone, or tries the same commit once more."""
    files = write(catalog, "r1", [references(NAMES)])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_commit_images", stop)
        with pytest.raises(KeyboardInterrupt):
            catalog.commit("r1", files)
    assert rows_by_name(catalog) == {}
    assert catalog.embeddings().num_rows == 0  # there, but nothing refers to them
    again = enrich(catalog, "r2", [references(NAMES)])
    assert again.num_added == len(NAMES)
    result = catalog.commit("r1", files)  # the first run wakes up
    assert (result.num_added, result.num_dropped) == (0, len(NAMES))
    vectors = catalog.embeddings()
    assert set(vectors["embed_run_id"].to_pylist()) == {"r2"}
    assert vectors.num_rows == 2 * len(NAMES)
    log = TableLog.open(catalog._folder, "embeddings").refresh()
    assert sum(file.num_rows for file in log.files.values()) == 4 * len(NAMES)  # not three times


def once(act: Callable[[], object]) -> Callable[[], object]:
    pending = [act]
    return lambda: pending.pop()() if pending else None


class interrupted:  # noqa: N801 (reads as a verb)
    """Lets ``act`` happen between the decision on a snapshot and its commit."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._write = commit_module._write

    def __enter__(self) -> None:
        def write_late(table: DeltaTable, *args: object) -> None:
            commit_module._write = self._write
            self._act()
            commit_module._write = write_late  # type: ignore[assignment]
            self._write(table, *args)  # type: ignore[arg-type]

        commit_module._write = write_late  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        commit_module._write = self._write


def test_a_change_must_fit_its_snapshot(catalog: Catalog, config: CatalogConfig) -> None:
    enrich(catalog, "r1", [references(NAMES)])
    log = TableLog.open(Folder(config), "images")
    seen: list[Snapshot] = []

    def add_again(snapshot: Snapshot) -> Change:
        seen.append(snapshot)
        return Change(add=tuple(snapshot.files.values()))

    with pytest.raises(CommitError, match="already in version"):
        commit(log, CommitRequest("c", "r", "test", 0), add_again)
    assert len(seen) == 1
