"""Tables that another program has changed: what is refused, by which words, and before what."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from tests.catalog_samples import DATE, config_of, enrich, open_catalog, references, request, rows_by_name, write
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.protocol import check_writable
from vlmflow.catalog.writable import check_tables
from vlmflow.errors import CatalogError, KnownImagesError, UnsupportedTableError

NAMES = [f"image {number}" for number in range(4)]
# Rows 0 and 2, as PROTOCOL.md serialises a RoaringBitmapArray inline (Z85 of its bytes).
DELETED = {
    "storageType": "i",
    "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000315c8Xg00062",
    "sizeInBytes": 36,
    "cardinality": 2,
}


class Table:
    """A table's log, as another program writes it."""

    def __init__(self, catalog: Path, name: str = "images") -> None:
        self.place, self._log = catalog / name, catalog / name / "_delta_log"

    def actions(self, kind: str) -> list[dict[str, Any]]:
        entries = (line for file in sorted(self._log.glob("*.json")) for line in file.read_text().splitlines())
        return [action[kind] for action in map(json.loads, entries) if kind in action]

    def commit(self, *actions: Mapping[str, Any]) -> None:
        number = max(int(file.stem) for file in self._log.glob("*.json")) + 1
        info = {"commitInfo": {"timestamp": int(time.time() * 1000), "operation": "WRITE"}}
        lines = "".join(json.dumps(action) + "\n" for action in (info, *actions))
        (self._log / f"{number:020d}.json").write_text(lines)

    def protocol(self, reader: int, writer: int, *features: str) -> dict[str, Any]:
        held: dict[str, Any] = {"minReaderVersion": reader, "minWriterVersion": writer}
        held |= {"readerFeatures": list(features)} if reader == 3 else {}
        return {"protocol": held | ({"writerFeatures": list(features)} if writer == 7 else {})}

    def metadata(self, configuration: Mapping[str, str] | None = None, **changes: Any) -> dict[str, Any]:
        held = self.actions("metaData")[-1]
        return {"metaData": held | {"configuration": held["configuration"] | (configuration or {})} | changes}

    def columns(self, change: Callable[[list[dict[str, Any]]], object]) -> dict[str, Any]:
        schema = json.loads(self.actions("metaData")[-1]["schemaString"])
        change(schema["fields"])
        return self.metadata(schemaString=json.dumps(schema))

    def replace(self, rows: pa.Table | None = None, **changes: Any) -> None:
        """Puts another file, at first the same, in the place of the newest one."""
        add = self.actions("add")[-1]
        removed = {"path": add["path"], "dataChange": True, "deletionTimestamp": 0, "size": add["size"]}
        if not {"path", "deletionVector"} & changes.keys():
            changes |= {"path": f"ingest_date={DATE}/part-{len(self.actions('add'))}.parquet", "stats": None}
            shutil.copy(self.place / add["path"], self.place / changes["path"])
        if rows is not None:
            pq.write_table(rows, self.place / changes["path"])
            changes["size"] = (self.place / changes["path"]).stat().st_size
        self.commit({"remove": removed | {"partitionValues": add["partitionValues"]}}, {"add": add | changes})

    def rows(self) -> pa.Table:
        return pq.read_table(self.place / self.actions("add")[-1]["path"], partitioning=None)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of four images."""
    place = tmp_path_factory.mktemp("sample") / "catalog"
    enrich(open_catalog(place), "r1", [references(NAMES)])
    return place


@pytest.fixture
def place(sample: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sample, tmp_path / "catalog")


@pytest.fixture
def table(place: Path) -> Table:
    return Table(place)


def test_the_tables_ask_for_no_more_than_the_first_readers_and_writers_know(place: Path) -> None:
    Catalog.open_or_create(config_of(place), pa.schema([("at", pa.timestamp("ns")), ("size", pa.uint64())]))
    for name in ("images", "embeddings"):
        asked = DeltaTable(place / name).protocol()
        assert (asked.min_reader_version, asked.min_writer_version) == (1, 2), name
        assert (asked.reader_features, asked.writer_features) == (None, None), name


def without(name: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda fields: fields.remove(next(field for field in fields if field["name"] == name))


def typed(name: str, kind: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda fields: next(field for field in fields if field["name"] == name).update(type=kind)


def deleted(table: Table) -> None:
    vectors = {"delta.enableDeletionVectors": "true"}
    table.commit(table.protocol(3, 7, "deletionVectors"), table.metadata(vectors))
    table.replace(deletionVector=DELETED)


def mapped(table: Table) -> None:
    numbers = itertools.count(1)

    def named(kind: Any) -> None:
        for field in kind.get("fields", []) if isinstance(kind, dict) else []:
            names = {"delta.columnMapping.id": next(numbers), "delta.columnMapping.physicalName": field["name"]}
            field["metadata"] = names
            named(field["type"])
        if isinstance(kind, dict) and kind["type"] == "array":
            named(kind["elementType"])

    changed = table.columns(lambda fields: named({"type": "struct", "fields": fields}))
    mode = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "999"}
    schema = changed["metaData"]["schemaString"]
    table.commit(table.protocol(2, 5), table.metadata(mode, schemaString=schema))


def cloned(table: Table) -> None:
    table.replace(path=f"file:{table.place}/elsewhere.parquet")


UNREADABLE: dict[str, tuple[Callable[[Table], None], str, str]] = {
    "deletion vectors": (deleted, "marked as deleted", "APPLY (PURGE)"),
    "column mapping": (mapped, "column mapping", "DROP FEATURE columnMapping"),
    "a feature of the future": (
        lambda table: table.commit(table.protocol(3, 7, "quantumV9")),
        "'quantumV9' is not supported",
        "DROP FEATURE quantumV9",
    ),
    "a version of the future": (lambda table: table.commit(table.protocol(9, 9)), "reader version 9", "turned it on"),
    "no partitions": (
        lambda table: table.commit(table.metadata(partitionColumns=[])),
        "partitioned by nothing, not by ingest_date",
        "restore",
    ),
    "no decision": (lambda table: table.commit(table.columns(without("decision"))), "no column decision", "restore"),
    "no caption": (lambda table: table.commit(table.columns(without("caption"))), "no column caption", "restore"),
    "another type": (
        lambda table: table.commit(table.columns(typed("width", "long"))),
        "width as int64, not as int32",
        "restore",
    ),
    "a shallow clone": (cloned, "outside its folder", "deep clone"),
    "no date": (
        lambda table: table.replace(partitionValues={"ingest_date": None}),
        "unmasked nulls",
        "without an ingest_date",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(place: Path, table: Table, case: str) -> None:
    change, told, remedy = UNREADABLE[case]
    catalog = Catalog.open(config_of(place))
    files = write(catalog, "r2", [references(["new"])])
    change(table)
    before = DeltaTable.is_deltatable(str(table.place)), len(list(table.place.glob("_delta_log/*.json")))
    for ask in (lambda: Catalog.open(config_of(place)).images(), catalog.images, lambda: catalog.commit("r2", files)):
        with pytest.raises(UnsupportedTableError, match="table images .*" + told) as raised:
            ask()
        assert remedy in raised.value.remedy
    assert before == (True, len(list(table.place.glob("_delta_log/*.json")))), "nothing was committed"


def new_column(table: Table, **told: Any) -> dict[str, Any]:
    field = {"name": "theirs", "type": "string", "nullable": True, "metadata": {}}
    return table.columns(lambda fields: fields.append(field | told))


UNWRITABLE: dict[str, tuple[Callable[[Table], Sequence[Mapping[str, Any]]], str]] = {
    "appends": (lambda table: [table.metadata({"delta.appendOnly": "true"})], "takes additions alone"),
    "constraint": (
        lambda table: [table.protocol(1, 3), table.metadata({"delta.constraints.wide": "width > 100"})],
        "CHECK constraint wide",
    ),
    "not null": (lambda table: [new_column(table, nullable=False)], "a column theirs that is NOT NULL"),
    "generated": (
        lambda table: [table.protocol(1, 4), new_column(table, metadata={"delta.generationExpression": "upper(uri)"})],
        "a column theirs that is generated",
    ),
    "rows tracked": (lambda table: [table.protocol(1, 7, "rowTracking")], "feature rowTracking"),
    "clustered": (lambda table: [table.protocol(1, 7, "clustering")], "feature clustering"),
    "of the future": (lambda table: [table.protocol(1, 7, "quantumV9")], "feature quantumV9"),
    "legacy": (lambda table: [table.protocol(1, 6)], "writers of version 6"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_to_is_read_and_refused_before_the_work(place: Path, table: Table, case: str) -> None:
    change, told = UNWRITABLE[case]
    catalog = Catalog.open(config_of(place))
    files = write(catalog, "r2", [references(["new"])])
    table.commit(*change(table))
    version = len(list(table.place.glob("_delta_log/*.json")))
    now = Catalog.open(config_of(place))
    assert sorted(rows_by_name(now)) == NAMES
    erased = to_binary(now.images(["image_id"])["image_id"].slice(0, 1))
    for ask in (
        lambda: check_tables(Folder(config_of(place))),
        lambda: catalog.commit("r2", files),
        lambda: now.erase(erased),
    ):
        with pytest.raises(UnsupportedTableError, match="table images .*" + told) as raised:
            ask()
        assert raised.value.remedy
    assert len(list(table.place.glob("_delta_log/*.json"))) == version
    assert not len(now.erased_keys), "no image is half erased"


def protocols() -> Iterator[tuple[str, int, int, tuple[str, ...]]]:
    """The features that PROTOCOL.md names, and the versions of before there were any."""
    yield from ((f"writer {version}", 1, version, ()) for version in range(1, 7))
    both = ("columnMapping", "deletionVectors", "timestampNtz", "typeWidening", "v2Checkpoint", "vacuumProtocolCheck")
    yield from ((name, 3, 7, (name,)) for name in both)
    of_writers = "appendOnly changeDataFeed checkConstraints checkpointProtection clustering domainMetadata " + (
        "generatedColumns icebergCompatV1 icebergCompatV2 identityColumns inCommitTimestamp invariants rowTracking "
    )
    yield from ((name, 1, 7, (name,)) for name in [*of_writers.split(), "allowColumnDefaults", "quantumV9"])


@pytest.mark.parametrize(("name", "reader", "writer", "features"), list(protocols()), ids=lambda value: str(value))
def test_nothing_is_let_through_that_deltalake_then_refuses(
    tmp_path: Path, name: str, reader: int, writer: int, features: tuple[str, ...]
) -> None:
    """And nothing is refused that it would commit: none of these is in use in the table."""
    DeltaTable.create(tmp_path / "images", pa.schema([("ingest_date", pa.date32())]), partition_by=["ingest_date"])
    table = Table(tmp_path)
    table.commit(table.protocol(reader, writer, *features))
    opened = DeltaTable(tmp_path / "images")
    try:
        check_writable("here", "images", opened)
        refused = False
    except UnsupportedTableError:
        refused = True
    try:
        opened.create_write_transaction([], "append", opened.schema(), ["ingest_date"])
        fails = False
    except CommitFailedError:
        fails = True
    assert refused == fails


def test_what_deltalake_does_not_commit_is_no_conflict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CommitFailedError("Transaction failed: it will not")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", refuse)
    monkeypatch.setattr("vlmflow.catalog.commit._LONGEST_DELAY_S", 0.0)
    catalog = Catalog.open(config_of(place))
    with pytest.raises(CatalogError, match="cannot be committed to: Transaction failed: it will not"):
        enrich(catalog, "r2", [references(["new"])])


def test_names_of_files_are_those_of_uris(place: Path, table: Table) -> None:
    old, new = table.place / table.actions("add")[-1]["path"], table.place / "a part" / "0.parquet"
    new.parent.mkdir()
    shutil.copy(old, new)
    table.replace(path="a%20part/0.parquet", stats=None)
    catalog = Catalog.open(config_of(place))
    assert [str(new)] == catalog.file_uris("images")
    again = enrich(catalog, "r2", [references(NAMES[:2], version="v2")], content="new", caption="a dog")
    assert again.num_replaced == 2
    assert {row["caption"] for row in rows_by_name(catalog).values()} == {"a cat", "a dog"}
    catalog.vacuum(retention=dt.timedelta())
    assert not new.exists(), "nothing needs it any more"


def test_rows_of_a_file_without_a_count_are_planned_wherever_it_stands(place: Path, table: Table) -> None:
    table.replace()
    catalog = Catalog.open(config_of(place))
    enrich(catalog, "r2", [references(["more"])])
    assert [file.num_rows for file in catalog.live_files("images").values()] == [1, 0]
    again = enrich(catalog, "r3", [references([*NAMES, "more"], version="v2")], content="new")
    assert again.num_replaced == len(NAMES) + 1


def test_images_with_more_than_one_row_are_counted(place: Path, table: Table) -> None:
    table.replace(pa.concat_tables([table.rows(), table.rows().slice(1, 2), table.rows().slice(2, 1)]))
    catalog = Catalog.open(config_of(place))
    for listed, count in ((NAMES, 2), (NAMES[:2], 1), (["more", NAMES[0]], 0)):
        with catalog.plan([references(listed)], request()) as plan:
            assert plan.num_doubled == count


def test_a_decision_that_is_none_is_review(place: Path, table: Table) -> None:
    rows = table.rows()
    at = rows.schema.get_field_index("decision")
    table.replace(rows.set_column(at, "decision", pa.array(["allow", None, "approved", "block"])))
    catalog = Catalog.open(config_of(place))
    assert catalog.images()["decision"].to_pylist() == ["allow", "review", "review", "block"]
    assert catalog.images(["uri", "decision"])["decision"].to_pylist() == ["allow", "review", "review", "block"]
    said = {"decision": "nonsense", "content_hash": rows["content_hash"][0].as_py()}
    verdicts = pa.array([said, {"decision": "allow"}, None, None], rows.schema.field("verdict").type)
    table.replace(rows.set_column(rows.schema.get_field_index("verdict"), "verdict", verdicts))
    newer = request(("caption",), fingerprints={"caption": "caption-2"})
    assert enrich(catalog, "r2", [references(NAMES)], newer, caption="a dog").num_replaced == len(NAMES)
    found = rows_by_name(catalog)
    assert [found[name]["decision"] for name in NAMES] == ["review", "review", "allow", "allow"], "of no model's word"
    table.replace(rows.drop_columns(["decision", "caption"]))
    assert set(catalog.images()["decision"].to_pylist()) == {"review"}
    with catalog.plan([references(NAMES, version="v2")], request()) as plan:
        assert plan.num_planned == len(NAMES)


def test_rows_without_what_makes_them_rows_are_named_by_their_file(place: Path, table: Table) -> None:
    rows = table.rows()
    table.replace(rows.drop_columns(["image_id"]))
    with pytest.raises(CatalogError, match=r"images/ingest_date=2026-03-01/part-1.parquet has rows without image_id"):
        Catalog.open(config_of(place)).images()
    at = rows.schema.get_field_index("uri")
    table.replace(rows.set_column(at, "uri", pa.array([*rows["uri"].to_pylist()[1:], None])))
    with pytest.raises(CatalogError, match=r"part-2.parquet has rows without uri"):
        Catalog.open(config_of(place)).images()
    at = rows.schema.get_field_index("image_id")
    table.replace(rows.set_column(at, "image_id", pa.array([*rows["image_id"].to_pylist()[1:], "mine"])))
    catalog = Catalog.open(config_of(place))
    with pytest.raises(CatalogError, match="image_id 'mine' is not 32") as raised, catalog.plan([], request()):
        pass
    assert "delete it" in raised.value.remedy


def test_an_erasure_and_a_vacuum_take_what_other_programs_wrote_and_replaced(place: Path) -> None:
    files = DeltaTable(place / "images")
    files.alter.set_table_properties({"delta.enableChangeDataFeed": "true"})
    for caption in ("one", "two"):
        files.update(predicate="uri = 'mem://image 0'", updates={"caption": f"'{caption}'"})
    catalog = Catalog.open(config_of(place))
    rows = catalog.images(["image_id", "uri"]).to_pylist()
    erased = next(row["image_id"] for row in rows if row["uri"] == "mem://image 0")

    def holding() -> list[Path]:
        there = [path for path in (place / "images").rglob("*.parquet") if "_delta_log" not in path.parts]
        return [path for path in there if erased in pq.read_table(path, partitioning=None)["image_id"].to_pylist()]

    assert len(holding()) == 5, "our file, two of the other's, and two copies of changed rows"
    result = catalog.erase(to_binary(pa.array([erased])))
    assert result.is_complete
    assert holding() == []
    files.update_incremental()
    files.update(predicate="uri = 'mem://image 1'", updates={"caption": "'three'"})
    kept = catalog.vacuum()
    assert (kept.num_files["old"], kept.num_foreign) == (0, 0)
    assert catalog.vacuum(retention=dt.timedelta()).num_files["old"] >= 2
    assert [str(path) for path in (place / "images").rglob("*.parquet")] == catalog.file_uris("images")


def test_damaged_records_and_hidden_files_stop_nothing_but_lists_of_known_images_do(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = Catalog.open(config_of(place))
    catalog.runs.start("r9", {"started_at": "2026-03-01T00:00:00+00:00"})
    (place / "runs" / "r9.json").write_text('{"started_at": "2026-')
    (place / "runs" / "r8.json").write_text("[]")
    (place / "runs" / "._r7.json").write_bytes(b"\x00\x05\x16\x07")
    assert {run.run_id: run.record for run in catalog.runs.newest()} == {"r9": {}, "r8": {}}
    assert "runs/r9.json is damaged" in caplog.text
    (place / "known").mkdir()
    (place / "known" / "._x.json").write_bytes(b"\x00\x05\x16\x07")
    (place / "images" / ".part-0.parquet.crc").write_bytes(b"crc")
    assert catalog.known_images.lists() == []
    assert catalog.verify([references(NAMES)], {}).findings.keys() <= {"dead_runs"}
    for below in ("reviews", "tombstones"):
        (place / below).mkdir()
        pq.write_table(pa.table({"a": [1]}), place / below / "mine.parquet")
        with pytest.raises(CatalogError, match=f"{below}/mine.parquet has no column .*: vlmflow did not write it"):
            _ = (catalog.reviews.events(), catalog.erased_keys)
        (place / below / "mine.parquet").write_bytes(b"PAR1")
        with pytest.raises(CatalogError, match=f"{below}/mine.parquet is damaged") as raised:
            _ = (catalog.reviews.events(), catalog.erased_keys)
        assert "take it away" in raised.value.remedy
        (place / below / "mine.parquet").unlink()
    for damage, error in (("{", CatalogError), ('{"name": "x"}', KnownImagesError)):
        (place / "known" / "x.json").write_text(damage)
        with pytest.raises(error, match=r"known/x\.json"):
            catalog.known_images.lists()
