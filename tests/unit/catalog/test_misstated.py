"""Planning finds the alternative texts that are not what they should be, and reads no more than it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog_samples import enrich, open_catalog, references, request
from tests.unit.catalog.test_found_text import NAMES, OCR, asked, listing, update
from vlmflow import schema
from vlmflow.alt_text import QUOTE, alt_text, quotes
from vlmflow.catalog import Catalog, PlanRequest
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.rows import restated

TEXTS = {"alt_text", "alt_text_rule"}

# Every whitespace character of Python's and some that are none; words that casefold to others; quotations.
SPACES = [chr(code) for code in range(0x3100) if chr(code).isspace()]
ODD = [
    "a",
    "b",
    "STRASSE",
    "straße",
    "İ",
    "\u00ad",
    "\u200b",
    "\ufeff",
    "\x00",
    '"',
    '".',
    ".",
    "😀",
    QUOTE,
    f'{QUOTE}".',
]
PARTS = st.sampled_from(ODD) | st.sampled_from(SPACES) | st.just(" ")
STRINGS = st.lists(PARTS, max_size=4).map("".join)
FOUND: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): STRINGS,
    pa.list_(pa.string()): st.lists(st.none() | STRINGS, max_size=3),
    pa.list_(pa.int64()): st.lists(st.none() | st.integers(0, 20), max_size=3),
    pa.int16(): st.integers(-300, 300),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.sampled_from([0.0, -0.0, 1.5, 1e16, 1e20, 1e-7, float("nan"), float("inf")]),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=2),
}


def as_text(value: object) -> str | None:
    if isinstance(value, list):
        return " ".join(str(part) for part in value if part is not None)
    return None if value is None else str(value)


@st.composite
def held(draw: st.DrawFn) -> tuple[pa.Table, list[int]]:
    """Rows, some of which say what was found as it stands; and those that are misstated, one looked at by one."""
    kind = draw(st.sampled_from(list(FOUND)))
    rows, misstated = [], []
    for number in range(draw(st.integers(0, 6))):
        found = draw(st.none() | FOUND[kind])
        caption = draw(st.none() | st.just("a red car with b") | STRINGS)
        of_caption = alt_text(caption, "mem://x", as_text(draw(st.just(found) | FOUND[kind])))
        plain = f'A red car.{QUOTE}{as_text(found)}".'
        text, rule = draw(st.sampled_from([of_caption, of_caption, (plain, None), (None, None), (None, "empty")]))
        row = {"uri": "mem://x", "caption": caption, "alt_text": text, "alt_text_rule": rule}
        rows.append(row | {"source": draw(st.just({"ocr": found}) if found is not None else st.none())})
        said = as_text(found)
        asked = (text, rule) == (None, None) or said is not None or QUOTE in (text or "")
        doubted = caption is not None and asked and (text is None or not quotes(text, said))
        if doubted and alt_text(caption, "mem://x", said) != (text, rule):
            misstated.append(number)
    fields = [(name, pa.string()) for name in ("uri", "caption", "alt_text", "alt_text_rule")]
    table = pa.Table.from_pylist(rows, pa.schema([*fields, ("source", pa.struct([("ocr", kind)]))]))
    cut = draw(st.integers(0, len(rows)))
    return pa.concat_tables([table.slice(0, cut), table.slice(cut)]), misstated


@settings(max_examples=150, deadline=None)
@given(held())
def test_the_misstated_rows_are_those_that_looking_at_each_finds(case: tuple[pa.Table, list[int]]) -> None:
    rows, misstated = case
    numbers, new = restated(rows, "ocr")
    assert numbers.tolist() == misstated
    of_rows = rows.take(pa.array(numbers)).to_pylist()
    found = [as_text((row["source"] or {}).get("ocr")) for row in of_rows]
    right = [alt_text(row["caption"], row["uri"], said) for row, said in zip(of_rows, found, strict=True)]
    assert list(zip(new["alt_text"].to_pylist(), new["alt_text_rule"].to_pylist(), strict=True)) == right


def rows_of(found: pa.Array, said: list[str]) -> pa.Table:
    """Rows of equal images whose alternative texts say this."""
    columns = {"uri": "mem://x", "caption": "a red car", "alt_text_rule": None}
    held = {name: pa.array([value] * len(found), pa.string()) for name, value in columns.items()}
    source = pa.StructArray.from_arrays([found], names=["ocr"])
    return pa.table(held | {"alt_text": pa.array(said, pa.string()), "source": source})


def test_whitespace_that_is_quoted_as_it_stands_is_joined() -> None:
    found = [*(f"a{space}b" for space in SPACES if space != " "), "a  b", " b", "b "]
    rows = rows_of(pa.array(found), [f'A red car.{QUOTE}{value}".' for value in found])
    assert restated(rows, "ocr")[0].tolist() == list(range(len(found)))


@pytest.mark.parametrize(
    "found",
    [
        pa.array(["SALE 20%", "a straße", "", None, 'so "it" is']),
        pa.array([["SALE", "20%"], ["x"], [], None, ["é", "è"]], pa.list_(pa.string())),
        pa.array([1, -20, None, 2**62, 0]),
    ],
    ids=["texts", "lists of lines", "numbers"],
)
def test_texts_that_are_right_become_no_objects(found: pa.Array, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr("vlmflow.catalog.rows.quotes", lambda text, _: looked_at.append(text) or True)
    said = [alt_text("a red car", "mem://x", as_text(value))[0] or "" for value in found.to_pylist()]
    rows = rows_of(found, said)
    assert restated(rows, "ocr")[0].tolist() == []
    assert looked_at == []


@pytest.fixture
def columns_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The columns of files that are read."""
    read: set[str] = set()
    original = Folder.read_parquet

    def reading(self: Folder, path: str, columns: Any = None) -> pa.Table:
        read.update(columns or ["all"])
        return original(self, path, columns)

    monkeypatch.setattr(Folder, "read_parquet", reading)
    return read


def planned(
    catalog: Catalog, listed: pa.RecordBatch, columns_read: set[str], asked: PlanRequest
) -> tuple[int, set[str]]:
    """How many rows are outdated, and which columns of the texts were read to find out."""
    columns_read.clear()
    with catalog.plan([listed], asked) as plan:
        return plan.num_outdated, columns_read & {"uri", "caption", *TEXTS, "all"}


def test_of_texts_that_are_right_uris_and_captions_are_not_read(tmp_path: Path, columns_read: set[str]) -> None:
    catalog = open_catalog(tmp_path / "catalog", pa.schema(list(OCR)))
    listed = listing("SALE 20%", None, "NEW")
    enrich(catalog, "r1", [listed], asked())
    assert planned(catalog, listed, columns_read, request()) == (0, set()), "the job names no column"
    assert planned(catalog, listed, columns_read, asked()) == (0, TEXTS)
    other_column = request(found_text_column="price")
    assert planned(catalog, listed, columns_read, other_column) == (3, TEXTS | {"uri", "caption"})


@pytest.mark.parametrize("task", ["caption", "embed"])
def test_rows_of_older_versions_are_asked_for_their_captions_until_they_have_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns_read: set[str], task: str
) -> None:
    listed, asked = references(NAMES), request((task,))
    with monkeypatch.context() as patched:
        new = {*TEXTS, "read_at"}
        patched.setattr(schema, "IMAGES", pa.schema([field for field in schema.IMAGES if field.name not in new]))
        patched.setattr("vlmflow.catalog.log.SCHEMA_VERSION", "2")
        patched.setattr("vlmflow.catalog.upgrade.SCHEMA_VERSION", "2")
        enrich(open_catalog(tmp_path / "catalog"), "r1", [listed], asked)
    catalog = open_catalog(tmp_path / "catalog")
    if task == "embed":
        assert planned(catalog, listed, columns_read, asked) == (0, set()), "there are no captions"
        return
    assert planned(catalog, listed, columns_read, asked) == (3, TEXTS | {"uri", "caption"})
    assert update(catalog, listed, asked) == 3
    assert {row["read_at"] for row in catalog.images().to_pylist()} == {None}, "no image was read"
    assert planned(catalog, listed, columns_read, asked) == (0, TEXTS)
