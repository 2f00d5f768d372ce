"""The caller's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import enrich, open_catalog, references, request, rows_by_name
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.columns import conform, missing_columns, source_columns, storable
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError


def test_types_become_ones_that_every_reader_knows() -> None:
    given = pa.schema(
        [
            ("small", pa.uint8()),
            ("large", pa.uint64()),
            ("when", pa.timestamp("ns")),
            ("name", pa.dictionary(pa.int32(), pa.string())),
            ("tags", pa.large_list(pa.large_string())),
            ("nested", pa.struct([("half", pa.float16())])),
            ("unknown", pa.null()),
        ]
    )
    assert storable(given) == pa.schema(
        [
            ("small", pa.int16()),
            ("large", pa.decimal128(20, 0)),
            ("when", pa.timestamp("us", tz="UTC")),
            ("name", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("nested", pa.struct([("half", pa.float32())])),
        ]
    )


def test_names_that_differ_by_case_only_are_refused() -> None:
    with pytest.raises(CatalogError, match="'Title' and 'title'"):
        storable(pa.schema([("Title", pa.string()), ("title", pa.string())]))


def test_a_type_that_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(CatalogError, match="'lasts' has type duration"):
        storable(pa.schema([("lasts", pa.duration("s"))]))


def test_only_new_columns_are_missing() -> None:
    table = schema.with_source(schema.IMAGES, pa.schema([("title", pa.string()), ("price", pa.float64())]))
    assert missing_columns(table, pa.schema([("title", pa.string())])) == ()
    assert missing_columns(table, pa.schema([("price", pa.int64())])) == ()  # fits into a double
    (field,) = missing_columns(table, pa.schema([("title", pa.string()), ("brand", pa.string())]))
    assert field == pa.field("source", pa.struct([("brand", pa.string())]))
    assert source_columns(schema.IMAGES) == pa.schema([])


def test_a_new_column_must_not_look_like_one_that_is_there() -> None:
    table = schema.with_source(schema.IMAGES, pa.schema([("title", pa.string())]))
    with pytest.raises(CatalogError, match="'title' and 'Title'"):
        missing_columns(table, pa.schema([("Title", pa.string())]))


def test_of_objects_only_new_members_are_missing() -> None:
    def kind(**members: pa.DataType) -> pa.Schema:
        return pa.schema([("meta", pa.struct(list(members.items())))])

    table = schema.with_source(schema.IMAGES, kind(a=pa.int64(), of=pa.list_(pa.struct([("x", pa.int64())]))))
    for known in (kind(a=pa.int32()), kind(of=pa.list_(pa.struct([("x", pa.int64())])), a=pa.float64())):
        assert missing_columns(table, known) == ()
    inner = pa.list_(pa.struct([("y", pa.string())]))
    (field,) = missing_columns(table, kind(b=pa.string(), of=inner))
    assert field.type.field("meta").type == pa.struct([("b", pa.string()), ("of", inner)])
    with pytest.raises(CatalogError, match="'meta' is struct<a: string> but the catalog holds it as"):
        missing_columns(table, kind(a=pa.string()))
    with pytest.raises(CatalogError, match=r"'meta\.of\.x' and 'meta\.of\.X' differ by case only"):
        missing_columns(table, kind(of=pa.list_(pa.struct([("X", pa.int64())]))))


def test_a_column_of_another_type_is_refused() -> None:
    table = schema.with_source(schema.IMAGES, pa.schema([("price", pa.int64())]))
    with pytest.raises(CatalogError, match="'price' is string but the catalog holds it as int64"):
        missing_columns(table, pa.schema([("price", pa.string())]))


def test_rows_get_nulls_for_what_they_lack_and_keep_null_structs() -> None:
    wanted = pa.schema([("a", pa.int64()), ("source", pa.struct([("x", pa.int64()), ("y", pa.string())]))])
    rows = pa.table({"source": pa.array([{"x": 1}, None], pa.struct([("x", pa.int32())])), "other": [1, 2]})
    got = conform(rows, wanted)
    assert got.schema == wanted
    assert got.to_pylist() == [{"a": None, "source": {"x": 1, "y": None}}, {"a": None, "source": None}]
    sliced = conform(rows.slice(1), wanted)
    assert sliced["source"].to_pylist() == [None]


@pytest.mark.parametrize("name", [".price", "[0]", "a.b", ""])
def test_a_column_may_have_any_name(name: str) -> None:
    narrow, wide = pa.struct([(name, pa.int32())]), pa.struct([(name, pa.int64())])
    rows = pa.table({"source": pa.array([{name: 1}, None], narrow)})
    assert conform(rows, pa.schema([("source", wide)]))["source"].to_pylist() == [{name: 1}, None]


def test_a_value_that_the_held_type_cannot_take_is_refused_by_the_name_of_its_column() -> None:
    rows = pa.table({"source": pa.array([{"price": 2**53 + 1}])})
    with pytest.raises(CatalogError, match="source column 'price' holds what does not become double") as raised:
        conform(rows, pa.schema([("source", pa.struct([("price", pa.float64())]))]))
    assert "another name" in raised.value.remedy


def test_a_source_changes_the_columns_that_it_has_and_no_others(tmp_path: Path) -> None:
    price, seller = pa.field("price", pa.float64()), pa.field("seller", pa.string())
    catalog = open_catalog(tmp_path / "catalog", pa.schema([price, seller]))
    first = {"price": 9.5, "seller": "ann"}
    enrich(catalog, "r1", [references(["a", "b"], source=[first, first])])

    # By their prefix, for another task; then from a list of one column, which is empty for one of the images.
    enrich(catalog, "r2", [references(["a", "b"])], request(("detect",)))
    assert {name: row["source"] for name, row in rows_by_name(catalog).items()} == {"a": first, "b": first}
    narrow = [{"price": 8.0}, {"price": None}]
    enrich(catalog, "r3", [references(["a", "b"], source=narrow, source_type=pa.struct([price]), version="v2")])
    rows = {name: row["source"] for name, row in rows_by_name(catalog).items()}
    assert rows == {"a": {"price": 8.0, "seller": "ann"}, "b": {"price": None, "seller": "ann"}}


def test_a_column_that_had_no_value_at_first_gets_those_of_a_later_night(tmp_path: Path) -> None:
    none, some = pa.struct([("price", pa.null())]), pa.struct([("price", pa.float64())])
    for run, kind, price in (("r1", none, None), ("r2", some, 9.5), ("r3", none, None)):
        catalog = open_catalog(tmp_path / "catalog", pa.schema(list(kind)))
        enrich(catalog, run, [references(["a", "b"], source=[{"price": price}] * 2, source_type=kind, version=run)])
        kept = None if run == "r1" else {"price": price}
        assert [row.get("source") for row in rows_by_name(catalog).values()] == [kept, kept]


def test_numbers_that_are_whole_go_into_a_catalog_of_integers_and_others_end_the_planning(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog", pa.schema([("stock", pa.int64())]))
    given = {"source_type": pa.struct([("stock", pa.float64())])}
    enrich(catalog, "r1", [references(["a"], source=[{"stock": 2.0}], **given)])
    assert rows_by_name(catalog)["a"]["source"] == {"stock": 2}
    with pytest.raises(CatalogError, match=r"'stock' holds what does not become int64, .*1\.5"):
        catalog.plan([references(["b"], source=[{"stock": 1.5}], **given)], request())


def test_nested_numbers_that_are_whole_go_into_a_catalog_of_integers_too(tmp_path: Path) -> None:
    held = pa.schema([("dims", pa.struct([("w", pa.int64())])), ("sizes", pa.list_(pa.int64()))])
    catalog = open_catalog(tmp_path / "catalog", held)
    wide = pa.schema([("dims", pa.struct([("w", pa.float64())])), ("sizes", pa.list_(pa.float64()))])
    catalog = open_catalog(tmp_path / "catalog", wide)
    given = {"source_type": pa.struct(list(wide))}
    listed = references(["a"], source=[{"dims": {"w": 2.0}, "sizes": [1.0, None]}], **given)
    enrich(catalog, "r1", [listed])
    assert rows_by_name(catalog)["a"]["source"] == {"dims": {"w": 2}, "sizes": [1, None]}
    assert catalog.plan([listed], request()).num_outdated == 0
    for one in ({"dims": {"w": 1.5}, "sizes": []}, {"dims": None, "sizes": [1.5]}):
        with pytest.raises(CatalogError, match=r"holds what does not become .*int64"):
            catalog.plan([references(["b"], source=[one], **given)], request())


def test_objects_gain_and_lose_members_from_night_to_night(tmp_path: Path) -> None:
    nights: list[dict[str, object]] = [
        {"w": 1.5},
        {"w": 2.5, "cut": {"x": 1.0}, "of": [{"k": "a"}]},
        {"of": [{"n": 2.0, "k": "b"}, None], "cut": {"y": 3.0}},
        {"w": 4.5},
    ]
    whole = {"w": None, "cut": None, "of": None}
    held = [
        {"w": 1.5},
        {**whole, **nights[1]},
        {"w": None, "cut": {"x": None, "y": 3.0}, "of": [{"k": "b", "n": 2.0}, None]},
        {**whole, "w": 4.5},
    ]
    for night, (meta, kept) in enumerate(zip(nights, held, strict=True)):
        own = pa.table({"meta": pa.array([meta, None])})
        given = {"source": [{"meta": meta}, {"meta": None}], "source_type": pa.struct(list(own.schema))}
        given["version"] = f"v{night // 2}"  # the second and the fourth are new values alone
        if night:  # as `plan` does, which adds no column
            opened = Catalog.open(CatalogConfig(uri=str(tmp_path / "catalog")))
            assert num_outdated(opened, given) == night % 2
        catalog = open_catalog(tmp_path / "catalog", own.schema)
        with catalog.plan([references(["a", "b"], **given)], request()) as plan:
            assert plan.num_due == 2 - night % 2 * 2
            assert sum(changed for _, changed in catalog.update_columns(f"u{night}", plan)) == night % 2
        enrich(catalog, f"r{night}", [references(["a", "b"], **given)])
        assert num_outdated(catalog, given) == 0
        rows = rows_by_name(catalog)
        assert rows["a"]["source"] == {"meta": kept}
        assert rows["b"]["source"] == {"meta": None}
        catalog.compact(f"c{night}")
        assert rows_by_name(catalog) == rows


def num_outdated(catalog: Catalog, given: dict[str, Any]) -> int:
    with catalog.plan([references(["a", "b"], **given)], request()) as plan:
        return plan.num_outdated
