"""Values that are the same, whatever their type, and rows that are found to hold others than the listing."""

from __future__ import annotations

import datetime as dt
import decimal
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog_samples import DATE, config_of, image_id, references
from vlmflow import schema
from vlmflow.catalog import outdated as outdated_module
from vlmflow.catalog.columns import conform, flat, storable
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.masks import alike
from vlmflow.catalog.outdated import find_outdated, held_as
from vlmflow.catalog.plan_parts import ReadLedger
from vlmflow.catalog.writer import write_file
from vlmflow.sources.tables import portable_schema, to_portable

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
TIMES = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1))
# What a Parquet file may hold, and values of it.
PLAIN: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): TEXTS,
    pa.large_string(): TEXTS,
    pa.binary(): st.binary(max_size=3),
    pa.binary(2): st.binary(min_size=2, max_size=2),
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-128, 127),
    pa.uint32(): st.integers(0, 2**32 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float16(): st.floats(width=16).map(np.float16),
    pa.float32(): st.just(math.nan) | st.floats(width=32),
    pa.float64(): st.just(math.nan) | st.floats(),
    pa.date32(): st.dates(dt.date(1900, 1, 1), dt.date(2200, 1, 1)),
    pa.date64(): st.dates(dt.date(1900, 1, 1), dt.date(2200, 1, 1)),
    pa.timestamp("us"): TIMES,
    pa.timestamp("ns"): TIMES,
    pa.timestamp("ms", "Europe/Berlin"): TIMES.map(lambda at: at.replace(microsecond=0, tzinfo=dt.UTC)),
    pa.decimal128(9, 2): st.decimals(-10_000, 10_000, places=2),
}


def _optional(kind: pa.DataType, values: st.SearchStrategy[Any]) -> tuple[pa.DataType, st.SearchStrategy[Any]]:
    return kind, st.none() | values


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def lists(of: tuple[pa.DataType, st.SearchStrategy[Any]]) -> tuple[pa.DataType, st.SearchStrategy[Any]]:
        return _optional(pa.list_(of[0]), st.lists(of[1], max_size=2))

    def structs(of: list[tuple[pa.DataType, st.SearchStrategy[Any]]]) -> tuple[pa.DataType, st.SearchStrategy[Any]]:
        names = [f"field {number}" for number in range(len(of))]
        kind = pa.struct([(name, one) for name, (one, _) in zip(names, of, strict=True)])
        return _optional(kind, st.fixed_dictionaries({name: one for name, (_, one) in zip(names, of, strict=True)}))

    return inner.map(lists) | st.lists(inner, min_size=1, max_size=2).map(structs)


COLUMNS = st.recursive(
    st.sampled_from([_optional(kind, values) for kind, values in PLAIN.items()]), _nested, max_leaves=3
)


@st.composite
def listings(draw: st.DrawFn) -> pa.Table:
    """A manifest's columns of one to three names, as the source gives them."""
    columns = draw(st.dictionaries(st.sampled_from(["price", "a.b", "a"]), COLUMNS, min_size=1))
    count = draw(st.integers(1, 5))
    arrays = [pa.array([draw(values) for _ in range(count)], kind) for kind, values in columns.values()]
    manifest = pa.table(arrays, names=list(columns))
    return to_portable(manifest, portable_schema(manifest.schema, "list.parquet"), "list.parquet")


def _listed(own: pa.Table) -> pa.Table:
    names = [str(number) for number in range(own.num_rows)]
    source = flat(own.to_struct_array())
    return pa.Table.from_batches([references(names)]).append_column("source", source)


def _held(folder: Folder, listed: pa.Table) -> tuple[pa.Table, pa.Field]:
    """The rows as a run would write them, read as planning reads them."""
    own = pa.schema(list(listed.schema.field("source").type))
    columns = schema.with_source(schema.IMAGES, storable(own))
    given = {"status": "ok", "decision": "allow", "run_id": "r"}
    rows = listed.select(["image_id", "uri", "source"])
    for name, value in given.items():
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    file = write_file(folder, "images", conform(rows, columns), DATE, "r")
    source = held_as(columns, listed.schema)
    return ReadLedger(folder, (file,), (), source)(0), source


def _numbers(listed: pa.Table, held: pa.Table, source: pa.Field) -> list[int]:
    at = np.arange(listed.num_rows)
    every = np.ones(listed.num_rows, np.bool_)
    found = find_outdated(listed, held, at, every, source, ~every)
    return sorted(number for numbers, _ in found for number in numbers.tolist())


@settings(max_examples=60, deadline=None)
@given(listings())
def test_of_an_equal_listing_no_row_is_outdated_whatever_the_type(tmp_path_factory: Any, own: pa.Table) -> None:
    folder = Folder(config_of(tmp_path_factory.getbasetemp() / "alike"))
    listed = _listed(own)
    held, source = _held(folder, listed)
    assert _numbers(listed, held, source) == []


@settings(max_examples=60, deadline=None)
@given(listings(), st.data())
def test_rows_whose_values_differ_are_found_and_no_others(
    tmp_path_factory: Any, own: pa.Table, data: st.DataObject
) -> None:
    folder = Folder(config_of(tmp_path_factory.getbasetemp() / "alike"))
    order = data.draw(st.permutations(range(own.num_rows)))
    listed, shuffled = _listed(own), _listed(own.take(order))
    shuffled = shuffled.set_column(0, "image_id", listed["image_id"])
    held, source = _held(folder, listed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outdated_module, "_ROWS_AT_ONCE", 2)
        found = _numbers(shuffled, held, source)
    values, others = held["source"].to_pylist(), held["source"].take(pa.array(order)).to_pylist()
    assert found == [number for number in range(own.num_rows) if not _same(values[number], others[number])]


def _same(left: object, right: object) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return all(_same(value, right[name]) for name, value in left.items())
    return left == right


def test_nulls_nan_and_empty_lists_are_what_they_are() -> None:
    kind = pa.struct([("scores", pa.list_(pa.float64())), ("cost", pa.decimal128(5, 2))])
    nan, cost = float("nan"), decimal.Decimal("1.50")
    values: list[Any] = [
        None,
        {"scores": None, "cost": None},
        {"scores": [], "cost": None},
        {"scores": [nan], "cost": cost},
        {"scores": [None], "cost": cost},
        {"scores": [0.0], "cost": cost},
        {"scores": [nan, 0.0], "cost": cost},
    ]
    for number, value in enumerate(values):
        left, right = pa.array([value] * len(values), kind), pa.array(values, kind)
        assert alike(left, right).tolist() == [other == number for other in range(len(values))]
    assert alike(pa.array([0.0]), pa.array([-0.0])).all()


def test_a_row_of_a_source_without_columns_holds_nulls() -> None:
    source = pa.field("source", pa.struct([("price", pa.float64())]))
    given_values = pa.array([{"price": None}, {"price": 1.0}], source.type)
    listed = pa.table({"image_id": [image_id("a"), image_id("b")], "source": given_values})
    held = pa.table({"source": pa.array([None, None], source.type)})
    assert _numbers(listed, held, source) == [1]
