"""How raw commits of deltalake double or lose rows, and that ours do not. On local disk and on S3 over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from tests.catalog_samples import DATE, constants, enrich, finish, references, request, rows_by_name, write
from tests.s3 import S3Server
from vlmflow import schema
from vlmflow.catalog import Catalog, plan_without_catalog
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import APPLICATION_ID, COMMIT_ID, DataFile, Snapshot, TableLog
from vlmflow.catalog.read import read_rows
from vlmflow.catalog.writer import write_file
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError, CommitError, StorageAccessError, TransientError

NAMES = [f"image {number}" for number in range(6)]

# What a store might do otherwise than a disk is always tried on both.
on_both_stores = pytest.mark.parametrize("config", ["local", "s3"], indirect=True)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> CatalogConfig:
    if request.param == "local":
        return CatalogConfig(uri=str(tmp_path / "catalog"))
    server: S3Server = request.getfixturevalue("s3_server")
    return CatalogConfig(uri=f"s3://{server.make_bucket()}/some where/catalog", storage=server.storage)


@pytest.fixture
def catalog(config: CatalogConfig) -> Catalog:
    return Catalog.open_or_create(config, pa.schema([]))


class Raw:
    """A writer that commits as deltalake's own interface has it."""

    def __init__(self, config: CatalogConfig) -> None:
        self.folder = Folder(config)

    def open(self) -> DeltaTable:
        return DeltaTable(self.folder.table_uri("images"), storage_options=self.folder.storage_options)

    def commit(
        self,
        table: DeltaTable,
        files: pa.Table,
        remove: Sequence[DataFile] = (),
        app: tuple[str, int] | None = None,
    ) -> None:
        actions: list[AddAction | RemoveAction] = []
        for row in files.filter(pc.equal(files["table"], "images")).to_pylist():
            path = row["path"].removeprefix("images/")
            values = {"ingest_date": row["ingest_date"].isoformat()}
            actions.append(AddAction(path, row["size_bytes"], values, 0, True, row["stats"]))
        for file in remove:
            values = {"ingest_date": file.ingest_date.isoformat()}
            actions.append(RemoveAction(file.path, True, int(time.time() * 1000), file.size_bytes, values))
        marks = [Transaction(*app)] if app else None
        properties = CommitProperties(app_transactions=marks, max_commit_retries=0 if app else None)
        table.create_write_transaction(actions, "append", table.schema(), ["ingest_date"], commit_properties=properties)

    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.live())

    def live(self) -> list[DataFile]:
        return list(TableLog.open(self.folder, "images").refresh().files.values())


@pytest.fixture
def raw(config: CatalogConfig) -> Raw:
    return Raw(config)


def rewritten(catalog: Catalog, run_id: str, version: str) -> pa.Table:
    """Descriptors of an added file that holds all rows anew, as a raw replacement would."""
    asked = request()
    writer = catalog.writer(constants(run_id, asked), catalog.version)
    rows = pa.Table.from_batches([references(NAMES, version=version)]).to_pylist()
    planned = [row | {"due": list(asked.tasks), "replaces": False, "attempts": 0, "ingest_date": DATE} for row in rows]
    columns = pa.schema([*schema.REFERENCE, *schema.PLANNED])
    return writer.write(finish(pa.Table.from_pylist(planned, schema=columns)))


# Each failure of raw commits that the design lists, and ours beside it


def test_two_writers_with_one_key(catalog: Catalog, config: CatalogConfig, raw: Raw) -> None:
    one, other = (write(catalog, run, [references(NAMES)]) for run in ("r1", "r2"))
    first, second = raw.open(), raw.open()
    raw.commit(first, one, app=None)
    raw.commit(second, other, app=None)
    assert raw.num_rows() == 2 * len(NAMES)


@on_both_stores
def test_ours_drop_a_key_that_another_run_has_added(catalog: Catalog, config: CatalogConfig) -> None:
    other = Catalog.open(config)
    ours = write(catalog, "r1", [references(NAMES[:4])])
    theirs = write(other, "r2", [references(NAMES[2:])])
    assert catalog.commit("r1", ours).num_added == 4
    result = other.commit("r2", theirs)
    assert (result.num_added, result.num_dropped, result.statuses) == (2, 2, {"ok": 2})
    rows = rows_by_name(catalog)
    assert {name: row["run_id"] for name, row in rows.items()} == {
        name: "r1" if number < 4 else "r2" for number, name in enumerate(NAMES)
    }
    assert catalog.embeddings().num_rows == 2 * len(NAMES)


@on_both_stores
def test_one_number_of_an_application_twice(catalog: Catalog, raw: Raw) -> None:
    one, other = (write(catalog, run, [references(NAMES)]) for run in ("r1", "r2"))
    stale = raw.open()
    raw.commit(raw.open(), one, app=(APPLICATION_ID, 1))
    with pytest.raises(CommitFailedError):
        raw.commit(stale, other, app=(APPLICATION_ID, 1))
    raw.commit(raw.open(), other, app=(APPLICATION_ID, 1))  # from a fresh handle it is accepted again
    assert raw.num_rows() == 2 * len(NAMES)


def test_ours_take_the_next_number_and_look_for_the_keys(catalog: Catalog, config: CatalogConfig) -> None:
    ours, theirs = (write(catalog, run, [references(NAMES)]) for run in ("r1", "r2"))
    catalog.commit("r1", ours)
    assert Catalog.open(config).commit("r2", theirs).num_dropped == len(NAMES)
    assert TableLog.open(Folder(config), "images").refresh().number == 1  # nothing to add is no commit
    enrich(catalog, "r3", [references(["more"])])
    assert TableLog.open(Folder(config), "images").refresh().number == 2


def test_a_file_removed_twice(catalog: Catalog, raw: Raw) -> None:
    catalog.commit("r1", write(catalog, "r1", [references(NAMES)]))
    old = raw.live()
    raw.commit(raw.open(), rewritten(catalog, "r2", "v2"), remove=old)
    raw.commit(raw.open(), rewritten(catalog, "r3", "v3"), remove=old)
    assert raw.num_rows() == 2 * len(NAMES)


def test_ours_refuse_to_remove_a_removed_file(catalog: Catalog, config: CatalogConfig, raw: Raw) -> None:
    catalog.commit("r1", write(catalog, "r1", [references(NAMES)]))
    (old,) = raw.live()
    enrich(catalog, "r2", [references(NAMES, version="v2")])
    log = TableLog.open(Folder(config), "images")
    with pytest.raises(CommitError, match="is to be removed but is not in version"):
        commit(log, CommitRequest("c", "r", "test", 0), lambda _: Change(remove=(old,)))


def test_a_replacement_after_compaction(catalog: Catalog, raw: Raw) -> None:
    for number, name in enumerate(NAMES):
        enrich(catalog, f"r{number}", [references([name])])
    old = raw.live()
    replacement = rewritten(catalog, "r9", "v2")
    raw.open().optimize.compact()
    raw.commit(raw.open(), replacement, remove=old)
    assert raw.num_rows() == 2 * len(NAMES)


@on_both_stores
@pytest.mark.parametrize("whose", ["ours", "raw"])
def test_ours_replace_rows_where_compaction_has_put_them(catalog: Catalog, config: CatalogConfig, whose: str) -> None:
    for number, name in enumerate(NAMES):
        enrich(catalog, f"r{number}", [references([name])])
    staged = write(catalog, "r9", [references(NAMES, version="v2")], content="new", caption="new")
    if whose == "ours":
        assert Catalog.open(config).compact("r8").num_files_after == 2
    else:
        Raw(config).open().optimize.compact()
    result = catalog.commit("r9", staged)
    assert (result.num_replaced, result.num_added) == (len(NAMES), 0)
    rows = rows_by_name(catalog)
    assert len(rows) == len(NAMES)
    assert {(row["caption"], row["seen_version"]) for row in rows.values()} == {("new", "v2")}


def test_a_restore_loses_what_others_wrote_and_ours_goes_on(catalog: Catalog, config: CatalogConfig, raw: Raw) -> None:
    enrich(catalog, "r1", [references(NAMES[:3])])
    before = catalog.version
    enrich(catalog, "r2", [references(NAMES[:3], version="v2")], content="two")
    theirs = write(catalog, "r3", [references(NAMES[:4], version="v3")], content="three", caption="three")
    enrich(catalog, "r4", [references(NAMES[4:])])
    raw.open().restore(before)
    assert raw.num_rows() == 3  # the rows of r4 are gone with those of r2
    result = catalog.commit("r3", theirs)
    assert (result.num_replaced, result.num_added) == (3, 1)
    rows = rows_by_name(catalog)
    assert {name: row["caption"] for name, row in rows.items()} == dict.fromkeys(NAMES[:4], "three")


def test_a_row_that_a_restore_took_away_comes_back_with_its_result(catalog: Catalog, raw: Raw) -> None:
    before = catalog.version
    enrich(catalog, "r1", [references(NAMES)])
    staged = write(catalog, "r2", [references(NAMES, version="v2")], content="two", caption="two")
    raw.open().restore(before)
    assert raw.num_rows() == 0
    assert catalog.commit("r2", staged).num_added == len(NAMES)
    assert {row["caption"] for row in rows_by_name(catalog).values()} == {"two"}


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


# Conflicts


@on_both_stores
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
    assert [log.first_commit_of(run) for run in ("r1", "r2", "r4")] == [1, None, None]
    log.refresh()
    assert [log.first_commit_of(run) for run in ("r1", "r2", "r4")] == [1, 2, 4]


def test_a_place_that_cannot_hold_a_catalog_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CatalogError, match=f"{tmp_path}/file is a file"):
        Catalog.open_or_create(CatalogConfig(uri=str(tmp_path / "file")), pa.schema([]))


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
    with pytest.raises(CommitError, match="does not exist" if damage == "gone" else "bytes, not"):
        catalog.commit("r1", files)
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


# Creating and changing tables


def test_the_other_run_creates_the_tables_first(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = TableLog.exists.__func__  # type: ignore[attr-defined]
    answers = iter([False, True, False, True])
    Catalog.open_or_create(config, pa.schema([]))
    monkeypatch.setattr(TableLog, "exists", classmethod(lambda cls, *args: next(answers, None) or exists(cls, *args)))
    catalog = Catalog.open_or_create(config, pa.schema([]))
    assert enrich(catalog, "r1", [references(NAMES)]).num_added == len(NAMES)


def test_runs_planned_before_there_was_a_catalog_add_each_image_once(config: CatalogConfig) -> None:
    asked = request()
    results = []
    for run_id in ("r1", "r2"):
        with plan_without_catalog([references(NAMES)], asked) as plan:
            catalog = Catalog.open_or_create(config, pa.schema([]))
            writer = catalog.writer(constants(run_id, asked), plan.version)
            files = pa.concat_tables([writer.write(finish(rows)) for rows in plan.batches()])
        results.append(catalog.commit(run_id, files))
        assert catalog.commit(run_id, files).repeated == (run_id == "r1")
    assert [(result.num_added, result.num_dropped) for result in results] == [(6, 0), (0, 6)]
    assert len(rows_by_name(catalog)) == len(NAMES)


@on_both_stores
def test_the_callers_columns_grow_by_an_explicit_commit(config: CatalogConfig) -> None:
    title, brand = pa.field("title", pa.string()), pa.field("brand", pa.string())
    catalog = Catalog.open_or_create(config, pa.schema([title]))
    enrich(catalog, "r1", [references(["a"], source=[{"title": "A"}])])
    running = write(catalog, "r2", [references(["b"], source=[{"title": "B"}])])
    replacing = write(catalog, "r3", [references(["a"], source=[{"title": "A2"}], version="v2")])
    wider = Catalog.open_or_create(config, pa.schema([brand, title]))
    assert wider.source_columns == pa.schema([title, brand])
    enrich(wider, "r4", [references(["c"], source=[{"brand": "C", "title": None}])])
    catalog.commit("r2", running)  # written before there was a brand
    catalog.commit("r3", replacing)
    rows = {name: row["source"] for name, row in rows_by_name(catalog).items()}
    assert rows == {
        "a": {"title": "A2", "brand": None},
        "b": {"title": "B", "brand": None},
        "c": {"title": None, "brand": "C"},
    }
    version = wider.version
    assert Catalog.open_or_create(config, pa.schema([title])).version == version  # nothing to add


def test_the_first_caller_with_columns_adds_the_struct(config: CatalogConfig) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    catalog = Catalog.open_or_create(config, pa.schema([("title", pa.string())]))
    enrich(catalog, "r2", [references(["b"], source=[{"title": "B"}])])
    assert {name: row["source"] for name, row in rows_by_name(catalog).items()} == {"a": None, "b": {"title": "B"}}


def test_a_column_of_another_type_stops_before_anything_is_written(config: CatalogConfig) -> None:
    catalog = Catalog.open_or_create(config, pa.schema([("price", pa.int64())]))
    version = catalog.version
    with pytest.raises(CatalogError, match="'price' is string"):
        Catalog.open_or_create(config, pa.schema([("price", pa.string())]))
    assert catalog.version == version


def test_a_catalog_of_another_version_is_refused(config: CatalogConfig) -> None:
    catalog = Catalog.open_or_create(config, pa.schema([]))
    catalog._images.table.alter.set_table_properties({"vlmflow.schemaVersion": "9"}, raise_if_not_exists=False)
    with pytest.raises(CatalogError, match="schema version 9, not 3") as raised:
        Catalog.open(config)
    assert "release" in raised.value.remedy


@on_both_stores
def test_no_catalog_and_no_bucket_are_told_apart(config: CatalogConfig) -> None:
    with pytest.raises(CatalogError, match="no catalog at"):
        Catalog.open(config)
    assert not Catalog.exists(config)
    if config.uri.startswith("s3:"):
        nowhere = config.model_copy(update={"uri": "s3://there-is-no-such-bucket/catalog"})
        with pytest.raises(StorageAccessError, match="does not exist"):
            Catalog.open_or_create(nowhere, pa.schema([]))


def test_the_log_keeps_numbers_and_ids_but_no_text(catalog: Catalog, config: CatalogConfig) -> None:
    enrich(catalog, "r1", [references(NAMES, text="a secret text")], caption="a secret caption")
    enrich(catalog, "r2", [references(NAMES, text="a secret text", version="v2")], content="two")
    catalog.compact("r3")
    folder = Folder(config)
    for file in folder.list("images/_delta_log"):
        log = folder.read(file.path) or b""
        assert b"secret" not in log
        assert b"mem://" not in log
    (action,) = pa.table(catalog._images.table.get_add_actions(flatten=True)).to_pylist()
    assert action["num_records"] == len(NAMES)
    assert (action["min.width"], action["max.width"]) == (8, 8)


# Helpers


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
