"""How raw commits of deltalake double or lose rows, and that ours do not. On local disk and on S3 over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction

from tests.catalog_samples import (
    DATE,
    constants,
    enrich,
    finish,
    on_both_stores,
    references,
    request,
    rows_by_name,
    write,
)
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import APPLICATION_ID, DataFile, TableLog
from vlmflow.config import CatalogConfig
from vlmflow.errors import CommitError

NAMES = [f"image {number}" for number in range(6)]


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
    assert TableLog.open(Folder(config), "images").refresh().number == 2  # nothing to add is a commit as well
    enrich(catalog, "r3", [references(["more"])])
    assert TableLog.open(Folder(config), "images").refresh().number == 3


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
