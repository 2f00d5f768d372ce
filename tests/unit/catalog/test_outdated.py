"""Rows with nothing due get the caller's columns of the newest listing, and nothing else of them changes."""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, request, rows_by_name
from vlmflow import schema
from vlmflow.catalog import Catalog, Plan
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import plan as plan_module
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.reviews import EVENT
from vlmflow.errors import CatalogError, RunRevokedError, SourceError

NAMES = ["a", "b", "c", "d"]
PRICE, SELLER = pa.field("price", pa.float64()), pa.field("seller", pa.string())
COLUMNS = pa.schema([PRICE, SELLER])


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path / "catalog", COLUMNS)
    enrich(made, "r1", [listing(1.0)])
    return made


def listing(
    price: float | None, names: Sequence[str] = NAMES, *, seller: str | None = "ann", **given: Any
) -> pa.RecordBatch:
    source = [{"price": price, "seller": seller}] * len(names)
    return references(names, source=source, source_type=pa.struct(list(COLUMNS)), **given)


def prices(names: Mapping[str, float | None]) -> pa.RecordBatch:
    """A listing of prices alone."""
    return references(names, source=[{"price": price} for price in names.values()], source_type=pa.struct([PRICE]))


def update(catalog: Catalog, *batches: pa.RecordBatch, between: Callable[[], object] = lambda: None) -> int:
    """Plans, lets others work ``between``, and updates; returns the rows that were changed."""
    with catalog.plan(batches, request()) as plan:
        between()
        return applied(catalog, "r2", plan)


def applied(catalog: Catalog, run_id: str, plan: Plan) -> int:
    return sum(count for _, count in catalog.update_columns(run_id, plan))


def columns_of(catalog: Catalog, name: str = "price") -> dict[str, Any]:
    return {image: row["source"][name] for image, row in rows_by_name(catalog).items()}


def num_outdated(catalog: Catalog, *batches: pa.RecordBatch, **asked: Any) -> int:
    with catalog.plan(batches, request(**asked)) as plan:
        return plan.num_outdated


def test_new_values_come_into_rows_and_nothing_else_changes(catalog: Catalog) -> None:
    before = rows_by_name(catalog)
    new = {"a": 1.0, "b": 2.5, "c": None, "d": float("inf")}
    with catalog.plan([prices(new)], request()) as plan:
        assert (plan.num_due, plan.num_unchanged, plan.num_outdated) == (0, 4, 3)
        assert plan.outdated_columns == {"price": 3}
        assert applied(catalog, "r2", plan) == 3
    after = rows_by_name(catalog)
    assert columns_of(catalog) == new
    assert columns_of(catalog, "seller") == dict.fromkeys(NAMES, "ann"), "that source does not have it"
    for name in NAMES:
        changed = {column for column, value in after[name].items() if value != before[name][column]}
        assert changed == (set() if name == "a" else {"source", "updated_at"})
        assert name == "a" or after[name]["updated_at"] > before[name]["updated_at"]
    version = catalog.version
    assert update(catalog, prices(new)) == 0
    assert catalog.version == version, "nothing was written"


def test_two_sources_with_different_columns_leave_each_other_alone(catalog: Catalog) -> None:
    sellers = references(NAMES, source=[{"seller": "bob"}] * 4)
    assert update(catalog, prices(dict.fromkeys(NAMES, 2.0))) == 4
    assert update(catalog, sellers) == 4
    assert columns_of(catalog) == dict.fromkeys(NAMES, 2.0)
    for again in (prices(dict.fromkeys(NAMES, 2.0)), sellers, references(NAMES)):
        assert num_outdated(catalog, again) == 0


def test_a_column_that_the_table_lacks_is_filled_in(catalog: Catalog) -> None:
    wide = references(NAMES, source=[{"brand": name} for name in NAMES])
    assert num_outdated(catalog, wide) == 4
    wider = open_catalog(catalog.uri, pa.schema([("brand", pa.string())]))
    assert update(wider, wide) == 4
    assert columns_of(wider, "brand") == {name: name for name in NAMES}
    assert columns_of(wider) == dict.fromkeys(NAMES, 1.0)
    unknown = references(NAMES, source=[{"size": None}] * 4, source_type=pa.struct([("size", pa.int64())]))
    assert num_outdated(wider, unknown) == 0


def test_a_narrower_type_is_compared_as_the_table_holds_it(catalog: Catalog) -> None:
    whole = pa.struct([("price", pa.int32())])
    assert num_outdated(catalog, references(NAMES, source=[{"price": 1}] * 4, source_type=whole)) == 0
    assert update(catalog, references(NAMES, source=[{"price": 2}] * 4, source_type=whole)) == 4
    assert columns_of(catalog) == dict.fromkeys(NAMES, 2.0)
    with pytest.raises(CatalogError, match="source column 'price' holds what does not become double") as raised:
        num_outdated(catalog, references(["a"], source=[{"price": 2**53 + 1}]))
    assert "another name" in raised.value.remedy


def test_a_second_listing_is_no_news_whatever_the_types_and_whoever_has_rewritten_the_rows(tmp_path: Path) -> None:
    at, day, cost = dt.datetime(2026, 1, 2, 3, 4, 5, 6), dt.date(2026, 1, 2), decimal.Decimal("9.90")
    given: dict[str, tuple[pa.DataType, list[Any]]] = {
        "text": (pa.string(), ["", None]),
        "bytes": (pa.binary(), [b"\0", None]),
        "half": (pa.float16(), [np.float16(0.1), None]),
        "ratio": (pa.float64(), [float("nan"), -0.0]),
        "cost": (pa.decimal128(5, 2), [cost, None]),
        "local": (pa.timestamp("us"), [at, None]),
        "zoned": (pa.timestamp("us", "Asia/Tokyo"), [at, None]),
        "day": (pa.date32(), [day, None]),
        "tags": (pa.list_(pa.string()), [["a", None], []]),
        "parts": (
            pa.list_(pa.struct([("size", pa.float32()), ("on", pa.bool_())])),
            [[{"size": None, "on": True}], None],
        ),
        "maker": (pa.struct([("name", pa.string()), ("at", pa.timestamp("us"))]), [{"name": None, "at": at}, None]),
        "first.part": (pa.uint8(), [255, None]),
        "first": (pa.int64(), [-(2**63), None]),
        ".hidden": (pa.int32(), [1, None]),
    }
    own = pa.table([pa.array(values, kind) for kind, values in given.values()], names=list(given))
    listed = references(["a", "b"]).append_column("source", own.to_struct_array().combine_chunks())
    catalog = open_catalog(tmp_path / "catalog", own.schema)
    enrich(catalog, "r1", [listed])
    assert num_outdated(catalog, listed) == 0
    enrich(catalog, "r2", [listed], request(("detect",)))
    catalog.compact("r3")
    other = listed.set_column(
        listed.schema.get_field_index("source"), "source", listed["source"].take(pa.array([1, 0]))
    )
    with catalog.plan([other], request()) as plan:
        assert plan.outdated_columns == dict.fromkeys(given, 2)
        assert applied(catalog, "r4", plan) == 2
    assert num_outdated(catalog, other) == 0
    assert num_outdated(catalog, listed) == 2


def test_rows_with_tasks_to_run_get_their_columns_by_these(catalog: Catalog) -> None:
    listed = [listing(2.0, ["a", "b"]), listing(2.0, ["c", "d", "new"], version="v2")]
    with catalog.plan(listed, request()) as plan:
        assert (plan.num_due, plan.num_outdated) == (3, 2)
    enrich(catalog, "r2", listed, problem=("read", "missing"))  # of which nothing comes but a mark
    assert columns_of(catalog) == {"a": 1.0, "b": 1.0, "c": 2.0, "d": 2.0, "new": 2.0}
    assert num_outdated(catalog, *listed) == 2


def test_a_limit_is_one_of_images_and_not_of_columns(catalog: Catalog) -> None:
    listed = listing(2.0, version={"a": "v1", "b": "v2", "c": "v2", "d": "v2"})
    with catalog.plan([listed], request(limit=1)) as plan:
        assert (plan.num_due, plan.num_planned, plan.num_outdated) == (3, 1, 3)
        assert plan.outdated_columns == {"price": 3}
        assert applied(catalog, "r2", plan) == 3
    assert columns_of(catalog) == {"a": 2.0, "b": 1.0, "c": 2.0, "d": 2.0}, "b goes into the pipeline"
    with catalog.plan([listed], request(limit=1)) as plan:
        assert (plan.num_due, plan.num_outdated) == (3, 0), "their versions are still to be met"


def test_images_that_are_not_tried_again_get_their_columns_too(catalog: Catalog) -> None:
    for attempt in range(3):
        enrich(catalog, f"gone-{attempt}", [listing(1.0, ["gone"])], problem=("read", "missing"))
    enrich(catalog, "broken", [listing(1.0, ["broken"])], problem=("decode", "corrupt"))
    before = rows_by_name(catalog)
    assert update(catalog, listing(2.0, ["gone", "broken"])) == 2
    after = rows_by_name(catalog)
    for name in ("gone", "broken"):
        kept = [column for column in after[name] if column not in ("source", "updated_at")]
        assert {column: after[name][column] for column in kept} == {column: before[name][column] for column in kept}
        assert after[name]["source"] == {"price": 2.0, "seller": "ann"}


def test_images_listed_twice_with_nan_are_one_and_the_same(catalog: Catalog) -> None:
    nan = float("nan")
    assert update(catalog, listing(nan), listing(nan)) == 4
    assert num_outdated(catalog, listing(nan), listing(nan)) == 0
    with pytest.raises(SourceError, match="1 images are listed twice with different columns"):
        num_outdated(catalog, listing(nan), listing(None))


def test_a_row_that_others_have_rewritten_keeps_what_they_wrote(catalog: Catalog) -> None:
    def judge() -> None:
        said = {"image_id": image_id("b"), "content_hash": "bytes-mem://b", "decision": "block", "reviewer": "ada"}
        events = [said | {"at": dt.datetime(2026, 11, 20, tzinfo=dt.UTC)}]
        catalog.reviews.add(pa.Table.from_pylist(events, schema=EVENT))
        catalog.apply_verdicts()

    def work() -> None:
        enrich(catalog, "other", [references(["a"], version="v2")], content="others", caption="a dog")
        judge()
        enrich(catalog, "more", [listing(1.0, ["e"])])
        catalog.compact("other")

    assert update(catalog, listing(2.0), between=work) == 4
    rows = rows_by_name(catalog)
    assert columns_of(catalog) == dict.fromkeys(NAMES, 2.0) | {"e": 1.0}
    assert (rows["a"]["caption"], rows["a"]["seen_version"], rows["a"]["run_id"]) == ("a dog", "v2", "other")
    assert (rows["b"]["decision"], rows["b"]["verdict"]["reviewer"]) == ("block", "ada")


def test_columns_that_another_run_has_changed_since_planning_stay(catalog: Catalog) -> None:
    def work() -> None:
        assert update(catalog, prices({"a": 3.0, "b": 1.0})) == 1
        enrich(catalog, "other", [prices({"c": 3.0})], request(("detect",)))
        enrich(catalog, "more", [references(["d"], version="v2")])

    assert update(catalog, listing(2.0), between=work) == 2
    assert columns_of(catalog) == {"a": 3.0, "b": 2.0, "c": 3.0, "d": 2.0}


def test_erased_images_do_not_come_back(catalog: Catalog) -> None:
    erased = to_binary(pa.array([image_id("b")]))
    assert update(catalog, listing(2.0), between=lambda: catalog.erase(erased)) == 3
    assert set(rows_by_name(catalog)) == {"a", "c", "d"}
    assert num_outdated(catalog, listing(3.0)) == 3


def test_a_run_that_was_revoked_updates_nothing(catalog: Catalog) -> None:
    request_of = commit_module.CommitRequest

    def revoke() -> None:
        asked = request_of("x", "vacuum", "revoke", 0, revokes=("r2",), always=True)
        commit_module.commit(catalog._images, asked, lambda _: commit_module.Change())

    with pytest.raises(RunRevokedError):
        update(catalog, listing(2.0), between=revoke)
    assert columns_of(catalog) == dict.fromkeys(NAMES, 1.0)


def test_another_writer_who_is_first_makes_it_decide_anew(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = commit_module._write
    others = [Catalog.open(config_of(catalog.uri))]

    def first_others(*arguments: Any) -> None:
        if others:
            other = others.pop()
            enrich(other, "other", [references(["a"], version="v2")], content="others", caption="a dog")
        write(*arguments)

    monkeypatch.setattr(commit_module, "_write", first_others)
    assert update(catalog, listing(2.0)) == 4
    rows = rows_by_name(catalog)
    assert columns_of(catalog) == dict.fromkeys(NAMES, 2.0)
    assert rows["a"]["caption"] == "a dog"
    live = {f"images/{path}" for path in catalog.live_files("images")}
    written = (tmp_path / "catalog" / "images").rglob("r2-*.parquet")
    assert {str(path.relative_to(tmp_path / "catalog")) for path in written} <= live, "nothing is left over"


def test_what_a_killed_run_has_not_updated_the_next_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files and groups, however the rows were put aside."""
    catalog = open_catalog(tmp_path / "catalog", COLUMNS)
    names = [f"image {number}" for number in range(200)]
    for part in range(4):
        enrich(catalog, f"r{part}", [listing(1.0, names[part * 50 : part * 50 + 50])])
    listed = [listing(2.0, names[start::7]) for start in range(7)]
    monkeypatch.setattr(plan_module, "_ROWS_PER_GROUP", 50)
    monkeypatch.setattr("vlmflow.catalog.spill._BUFFERED_ROWS", 16)
    monkeypatch.setattr("vlmflow.catalog.outdated._ROWS_AT_ONCE", 3)
    version = catalog.version
    with catalog.plan(listed, request()) as plan:
        groups = catalog.update_columns("killed", plan)
        done = next(groups)[1]
        assert 0 < done < 200
        assert len(catalog.live_files("images")) == 4
        assert catalog.version == version + 1
    with catalog.plan(listed, request()) as plan:
        catalog.compact("other")  # the files of several groups become one
        assert plan.num_outdated == 200 - done
        assert applied(catalog, "again", plan) == 200 - done
    assert columns_of(catalog) == dict.fromkeys(names, 2.0)
    assert len(catalog.live_files("images")) == 1
    assert {row["run_id"] for row in rows_by_name(catalog).values()} == {"r0", "r1", "r2", "r3"}


def test_a_listing_without_columns_reads_none(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Sequence[str]] = []
    original = plan_module.ReadLedger.__call__

    def spied(self: Any, number: int) -> pa.Table:
        read.append([] if self.source is None else [field.name for field in self.source.type])
        return original(self, number)

    monkeypatch.setattr(plan_module.ReadLedger, "__call__", spied)
    assert num_outdated(catalog, references(NAMES)) == 0
    assert num_outdated(catalog, prices({"a": 1.0})) == 0
    assert read == [[], ["price"]]


def test_a_table_of_before_the_first_column_is_read_as_one_of_nulls(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [references(NAMES)])
    assert schema.IMAGES.get_field_index("source") < 0
    assert num_outdated(catalog, prices({"a": None, "b": 1.0})) == 1
    wider = open_catalog(catalog.uri, pa.schema([PRICE]))
    assert update(wider, prices({"a": None, "b": 1.0})) == 1
    assert {name: row["source"] for name, row in rows_by_name(wider).items()} == {
        "a": None,
        "b": {"price": 1.0},
        "c": None,
        "d": None,
    }


def test_values_that_a_listing_no_longer_has_are_outdated_where_all_are_gone_too(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog", pa.schema([("price", pa.float64())]))
    enrich(catalog, "r1", [references(["a"], source=[{"price": 1.5}])])
    nothing = pa.struct([("price", pa.null()), ("unknown", pa.null())])
    assert num_outdated(catalog, references(["a"], source=[{"price": None, "unknown": None}], source_type=nothing)) == 1
