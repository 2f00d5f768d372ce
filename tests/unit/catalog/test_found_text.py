"""An alternative text quotes what the caller has found in the image, as the last listing has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, enrich, open_catalog, references, request, rows_by_name
from vlmflow import schema
from vlmflow.alt_text import alt_text
from vlmflow.alt_text_report import find_alt_texts
from vlmflow.catalog import Catalog, PlanRequest

NAMES = ["a", "b", "c"]
OCR = pa.struct([("ocr", pa.string()), ("price", pa.int64())])


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path / "catalog", pa.schema(list(OCR)))
    enrich(made, "r1", [listing("SALE 20%", "SALE 20%", None)], asked())
    assert texts(made) == [said("SALE 20%"), said("SALE 20%"), said(None)]
    return made


def asked(**given: Any) -> PlanRequest:
    return request(found_text_column="ocr", **given)


def listing(*found: str | None, price: int = 1, **given: Any) -> pa.RecordBatch:
    source = [{"ocr": text, "price": price} for text in found]
    return references(NAMES[: len(found)], source=source, source_type=OCR, **given)


def said(found: str | None) -> tuple[str | None, str | None]:
    return alt_text("a cat", "mem://a", found)


def texts(catalog: Catalog) -> list[tuple[str | None, str | None]]:
    rows = rows_by_name(catalog)
    return [(rows[name]["alt_text"], rows[name]["alt_text_rule"]) for name in NAMES]


def update(catalog: Catalog, listed: pa.RecordBatch, request: PlanRequest) -> int:
    with catalog.plan([listed], request) as plan:
        assert plan.num_due == 0
        return sum(changed for _, changed in catalog.update_columns("r2", plan))


def test_a_corrected_text_comes_into_the_alternative_text(catalog: Catalog) -> None:
    assert update(catalog, listing("SOLD OUT", "SALE 20%", "x" * 200), asked()) == 2
    assert texts(catalog) == [said("SOLD OUT"), said("SALE 20%"), said("x" * 200)]
    assert texts(catalog)[2][1] == "too_long"
    assert update(catalog, listing(None, None, None), asked()) == 3
    assert texts(catalog) == [said(None)] * 3


def test_of_rows_with_other_columns_alone_the_alternative_text_stays(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(catalog)
    monkeypatch.setattr("vlmflow.catalog.rows.alt_text", lambda *_: ("of another version", None))
    assert update(catalog, listing("SALE 20%", "SALE 20%", None, price=2), asked()) == 3
    assert update(catalog, listing("SOLD OUT", "SALE 20%", None, price=2), request()) == 1
    assert texts(catalog) == before, "that source does not say which of its columns it is"


@pytest.mark.parametrize("problem", [None, ("read", "missing")])
def test_so_does_one_of_an_image_with_other_tasks_to_run(catalog: Catalog, problem: tuple[str, str] | None) -> None:
    listed = listing("SOLD OUT", "SALE 20%", "NEW", text="a cat")
    enrich(catalog, "r2", [listed], asked(), problem=problem)
    rows = rows_by_name(catalog)
    assert {rows[name]["run_id"] for name in NAMES} == {"r2"}
    assert texts(catalog) == [said("SOLD OUT"), said("SALE 20%"), said("NEW")]


def test_a_new_caption_quotes_the_new_text(catalog: Catalog) -> None:
    enrich(catalog, "r2", [listing("SOLD OUT", version="v2")], asked(), content="other", caption="a dog")
    assert texts(catalog) == [alt_text("a dog", "mem://a", "SOLD OUT"), said("SALE 20%"), said(None)]


def test_a_column_that_is_named_later_or_renamed_is_quoted(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path / "catalog", pa.schema(list(OCR)))
    listed = listing("SALE 20%", "a CAT", None)
    enrich(catalog, "r1", [listed], request())
    assert texts(catalog) == [said(None)] * 3
    before = rows_by_name(catalog)
    assert update(catalog, listed, asked()) == 1
    assert texts(catalog) == [said("SALE 20%"), said(None), said(None)], "of b the caption says it"
    after = rows_by_name(catalog)
    assert after["a"] == before["a"] | {key: after["a"][key] for key in ("alt_text", "alt_text_rule", "updated_at")}
    assert after["a"]["updated_at"] > before["a"]["updated_at"]
    assert (after["b"], after["c"]) == (before["b"], before["c"])
    with catalog.plan([listed], request(found_text_column="price")) as plan:
        assert (plan.num_outdated, plan.outdated_columns) == (3, {"alt_text": 3})
    assert update(catalog, listed, request(found_text_column="price")) == 3
    assert texts(catalog) == [said("1")] * 3
    for column in ("price", None):
        assert update(catalog, listed, request(found_text_column=column)) == 0, "whoever quoted it"


@pytest.mark.parametrize("columns", [[], list(OCR)], ids=["no columns", "columns"])
@pytest.mark.parametrize("rewritten", [False, True])
def test_rows_of_before_there_were_alternative_texts_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[pa.Field], rewritten: bool
) -> None:
    listed = listing("SALE 20%", None, None) if columns else references(NAMES)
    new = ("alt_text", "alt_text_rule", "read_at")
    with monkeypatch.context() as patched:
        old = pa.schema([field for field in schema.IMAGES if field.name not in new])
        patched.setattr(schema, "IMAGES", old)
        patched.setattr("vlmflow.catalog.log.SCHEMA_VERSION", "2")
        patched.setattr("vlmflow.catalog.upgrade.SCHEMA_VERSION", "2")
        older = open_catalog(tmp_path / "catalog", pa.schema(columns))
        enrich(older, "r1", [listed])
    catalog = open_catalog(older.uri, pa.schema(columns))
    if rewritten:
        catalog.compact("other")
    assert texts(catalog) == [(None, None)] * 3
    assert find_alt_texts(config_of(catalog.uri)).num_without == 3
    enrich(catalog, "r2", [references(["c"])], request(("detect",)))
    assert texts(catalog)[2] == said(None)
    with catalog.plan([listed], asked()) as plan:
        assert plan.outdated_columns == {"alt_text": 2}
        assert sum(changed for _, changed in catalog.update_columns("r3", plan)) == plan.num_outdated
    assert texts(catalog) == [said("SALE 20%" if columns else None), said(None), said(None)]
    assert find_alt_texts(config_of(catalog.uri)).num_without == 0
    assert update(catalog, listed, asked()) == 0
