"""Tables that another program has written anew, as any may: in another order, in other files, under other types."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.catalog_samples import DATE, config_of, enrich, image_id, open_catalog, references, request, rows_by_name
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import plain
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import TableName
from vlmflow.catalog.reviews import EVENT

NAMES = [f"image {number}" for number in range(6)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = open_catalog(tmp_path / "catalog", pa.schema([("title", pa.string())]))
    enrich(catalog, "r1", [references(NAMES, source=[{"title": name} for name in NAMES])])
    return catalog


def table(catalog: Catalog, name: TableName = "images") -> DeltaTable:
    return DeltaTable(f"{catalog.uri}/{name}")


def apart(catalog: Catalog) -> None:
    """Puts the first views of all images in one file, the second ones in another."""
    rows = table(catalog, "embeddings").to_pyarrow_table()
    for mode, view in (("overwrite", "squash"), ("append", "center")):
        some = rows.filter(pc.equal(rows["view"], view))
        write_deltalake(f"{catalog.uri}/embeddings", some, mode=mode)  # type: ignore[call-overload]


def mixed(catalog: Catalog) -> None:
    """Puts all in one file, no two views of an image next to each other."""
    rows = table(catalog, "embeddings").to_pyarrow_table().sort_by("view")
    write_deltalake(f"{catalog.uri}/embeddings", rows, mode="overwrite")


@pytest.mark.parametrize("rearrange", [apart, mixed])
def test_every_view_counts_wherever_it_lies(catalog: Catalog, rearrange: Callable[[Catalog], None]) -> None:
    before = catalog.embeddings().sort_by([("image_id", "ascending"), ("view", "ascending")])
    rearrange(catalog)
    now = Catalog.open(config_of(catalog.uri))
    assert now.embeddings().sort_by([("image_id", "ascending"), ("view", "ascending")]).equals(before)
    result = now.compact("r2")
    assert result.num_embeddings_dropped == 0
    assert now.embeddings().num_rows == before.num_rows


@pytest.mark.parametrize("rearrange", [apart, mixed])
def test_views_that_lie_apart_are_not_copied_in_part(catalog: Catalog, rearrange: Callable[[Catalog], None]) -> None:
    rows, hashes = table(catalog).to_pyarrow_table(), [f"{number:032x}" * 2 for number in range(len(NAMES))]
    at = rows.schema.get_field_index("content_hash")
    write_deltalake(f"{catalog.uri}/images", rows.set_column(at, "content_hash", pa.array(hashes)), mode="overwrite")
    known = Catalog.open(config_of(catalog.uri)).known_bytes(request(), None)
    assert known is not None
    mask, copies = known.copies(hashes)
    assert mask.all()
    assert pc.list_value_length(copies["vectors"]).to_pylist() == [2] * len(NAMES)
    rearrange(catalog)
    assert Catalog.open(config_of(catalog.uri)).known_bytes(request(), None) is None


def test_a_view_that_a_killed_run_left_twice_counts_once_among_any_number_of_views(catalog: Catalog) -> None:
    rows = table(catalog, "embeddings").to_pyarrow_table()
    one = rows.filter(pc.equal(rows["view"], "squash"))
    views = [f"tile-{number}" for number in range(150)]
    many = pa.concat_tables(
        [one.set_column(one.schema.get_field_index("view"), "view", pa.repeat(name, len(one))) for name in views]
    )
    order = pa.array(np.random.default_rng(0).permutation(2 * len(many)))
    twice = pa.concat_tables([many, many]).take(order)
    write_deltalake(f"{catalog.uri}/embeddings", twice.slice(0, 900), mode="overwrite")
    write_deltalake(f"{catalog.uri}/embeddings", twice.slice(900), mode="append")
    found = Catalog.open(config_of(catalog.uri)).embeddings(["image_id", "view"])
    assert found.num_rows == len(views) * len(NAMES)
    assert len(set(zip(*found.to_pydict().values(), strict=True))) == found.num_rows


def test_rows_that_deltalake_has_updated_are_planned_replaced_and_joined(catalog: Catalog) -> None:
    uri = "mem://image 0"
    for name, updates in (("images", {"caption": "'by hand'"}), ("embeddings", {"time_s": "1.5"})):
        is_first = f"image_id = '{catalog.images(['image_id', 'uri']).filter(pc.field('uri') == uri)['image_id'][0]}'"
        table(catalog, name).update(predicate=is_first, updates=updates)  # type: ignore[arg-type]
    now = Catalog.open(config_of(catalog.uri))
    (path,) = now.file_uris("images")
    assert pa.string_view() in pa.parquet.read_schema(path).types, "deltalake writes texts as such"
    assert rows_by_name(now)["image 0"]["caption"] == "by hand"
    listed = [references(NAMES, source=[{"title": name} for name in NAMES])]
    with now.plan(listed, request()) as plan:
        assert (plan.num_planned, plan.num_outdated) == (0, 0)
    assert now.verify(listed, {}).findings.keys() <= {"foreign_files"}
    again = [references(NAMES[:3], version="v2", source=[{"title": "new"}] * 3)]
    assert enrich(now, "r2", again, content="new", caption="a dog").num_replaced == 3
    now.compact("r3")
    rows = rows_by_name(now)
    assert {rows[name]["caption"] for name in NAMES[:3]} == {"a dog"}
    assert [rows[name]["source"]["title"] for name in NAMES] == ["new"] * 3 + NAMES[3:]
    assert now.embeddings().num_rows == 2 * len(NAMES)


def test_columns_of_another_program_stay_whatever_is_written(catalog: Catalog) -> None:
    theirs = pa.schema(
        [
            ("owner", pa.string()),
            ("tags", pa.map_(pa.string(), pa.string())),
            ("price", pa.decimal128(10, 2)),
            ("notes", pa.list_(pa.struct([("at", pa.date32()), ("by", pa.binary())]))),
        ]
    )
    value = {"owner": "ada", "tags": [("k", "v")], "price": Decimal("1.25"), "notes": [{"at": DATE, "by": b"x"}]}
    rows = table(catalog).to_pyarrow_table()
    for field in theirs:
        rows = rows.append_column(field, pa.array([value[field.name]] * len(NAMES), field.type))
    write_deltalake(f"{catalog.uri}/images", rows, mode="overwrite", schema_mode="merge")  # type: ignore[call-overload]
    now, since = Catalog.open(config_of(catalog.uri)), catalog.version + 1
    listed = [{"title": "new title"}] * len(NAMES)
    enrich(now, "r2", [references(NAMES[:2], version="v2", source=listed[:2])], content="new", caption="a dog")
    with now.plan(
        [references(NAMES, version={name: "v2" if name in NAMES[:2] else "v1" for name in NAMES}, source=listed)],
        request(),
    ) as plan:
        assert sum(changed for _, changed in now.update_columns("r3", plan)) == len(NAMES) - 2
    enrich(now, "r4", [references(["more"], source=[{"title": "more"}])])
    event = {"image_id": image_id(NAMES[5]), "content_hash": f"bytes-mem://{NAMES[5]}", "decision": "block"}
    at = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
    now.reviews.add(pa.Table.from_pylist([event | {"reviewer": "ada", "at": at}], schema=EVENT))
    assert now.apply_verdicts().num_changed == 1
    now.compact("r5")
    changes = pa.concat_tables(now.changes(since).tables())
    names = {row["image_id"]: row["changed_columns"] for row in changes.to_pylist()}
    assert names[image_id(NAMES[3])] == ["source.title"], "theirs are compared, and as they were"
    now.erase(to_binary(pa.array([image_id(NAMES[4])])))
    found = rows_by_name(Catalog.open(config_of(catalog.uri)))
    assert sorted(found) == [*NAMES[:4], NAMES[5], "more"]
    kept = {name: {column: row[column] for column in theirs.names} for name, row in found.items()}
    assert kept == dict.fromkeys([*NAMES[:4], NAMES[5]], value) | {"more": dict.fromkeys(theirs.names)}


def test_every_way_in_which_arrow_holds_texts_and_lists_becomes_one() -> None:
    text, rows = pa.string_view(), [{"a": "x", "b": [{"c": "y"}]}, None]
    nested = pa.struct([("a", text), ("b", pa.large_list(pa.struct([("c", pa.large_string())])))])
    given = pa.table(
        {
            "view": pa.array(["x", None], text),
            "large": pa.array([b"x", None], pa.large_binary()),
            "coded": pa.array(["x", None]).dictionary_encode(),
            "nested": pa.array(rows, nested),
            "map": pa.array([[("k", "v")], None], pa.map_(text, text)),
            "number": pa.array([1, None], pa.int16()),
        }
    )
    found = plain(given)
    assert found.to_pylist() == given.to_pylist()
    assert found.schema.types == [
        pa.string(),
        pa.binary(),
        pa.string(),
        pa.struct([("a", pa.string()), ("b", pa.list_(pa.struct([("c", pa.string())])))]),
        pa.map_(pa.string(), pa.string()),
        pa.int16(),
    ]
    assert plain(found) is found
