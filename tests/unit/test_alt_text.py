"""Alternative texts: what is mended, and which rule names what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from tests.catalog_samples import constants, finish, open_catalog, references, request, rows_by_name
from vlmflow import alt_text_report
from vlmflow.alt_text import MAX_CHARS, RULES, alt_text
from vlmflow.alt_text_report import AltTextReport, broken_alt_texts, find_alt_texts
from vlmflow.config import CatalogConfig
from vlmflow.summary import summarize
from vlmflow.views_search import alt_texts_csv, print_alt_texts

URI = "s3://shop/img/sku-0042.jpg"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on yellow grass", "A dog on yellow grass."),
        ("A photo of a dog on grass", "A dog on grass."),
        ("there is an image of  two cats\n on a bed", "Two cats on a bed."),
        ("a picture of a photograph of a red car", "A red car."),
        ("The image shows: a red car, parked,", "A red car, parked."),
        ("a close up photo of a hummingbird!", "A hummingbird!"),
        ("a painting of the sea", "A painting of the sea."),  # says more than that there is a picture
        ("the picture frame hangs on a wall", "The picture frame hangs on a wall."),
        ("a photo-booth in a mall", "A photo-booth in a mall."),
        ("photo albums on a table", "Photo albums on a table."),
        ("a red car \N{EN DASH}", "A red car."),
        ('a sign that says "stop."', 'A sign that says "stop."'),
        ("\u00e9t\u00e9 \u00e0 la plage", "\u00c9t\u00e9 \u00e0 la plage."),
    ],
)
def test_what_can_be_mended_is_mended(caption: str, expected: str) -> None:
    assert alt_text(caption, URI) == (expected, None)


@pytest.mark.parametrize(
    ("caption", "rule"),
    [
        ("", "empty"),
        (" ... ", "empty"),
        ("picture dog and cat in it", "opening"),
        ("an image", "opening"),
        ("sku 0042", "file_name"),
        ("SKU_0042.", "file_name"),
        ("a screenshot named IMG_20391", "file_name"),
        ("something in holiday.jpeg there", "file_name"),
        ("a man standing next to a", "unfinished"),
        ("a dog, with", "unfinished"),
        ("a dog", "too_short"),
        ("a dog and " * 20 + "a cat", "too_long"),
    ],
)
def test_what_cannot_be_mended_is_named(caption: str, rule: str) -> None:
    text, broken = alt_text(caption, URI)
    assert broken == rule
    assert rule in RULES
    assert (text is None) == (rule == "empty"), "the text is kept for whoever mends it"


def test_without_a_caption_there_is_no_text_and_no_rule() -> None:
    assert alt_text(None, URI, "SALE") == (None, None)


def test_text_found_in_the_image_is_quoted_once() -> None:
    assert alt_text("a red sign", URI, " SALE\n50% ") == ('A red sign. Text in the image: "SALE 50%".', None)
    assert alt_text("a sign that reads sale 50% today", URI, "SALE 50%")[0] == "A sign that reads sale 50% today."
    assert alt_text("a red sign", URI, "  ")[0] == "A red sign."
    assert alt_text("a red sign", URI, "x" * MAX_CHARS)[1] == "too_long"


@pytest.mark.parametrize(
    "uri",
    [
        "https://shop.example/a%20man%20riding%20a%20horse.jpg",
        "https://shop.example/img%2Fa-man-riding-a-horse.jpg?v=1.2",
        "/shop/a man riding a horse.jpg",
    ],
)
def test_a_file_name_is_known_as_people_read_it(uri: str) -> None:
    caption = "img a man riding a horse" if "%2F" in uri else "a man riding a horse"
    assert alt_text(caption, uri)[1] == "file_name"
    assert alt_text("100%25", "/shop/100%.jpg")[1] == "too_short", "percent signs of a file are its own"


def test_the_name_of_an_archive_member_is_a_file_name_too() -> None:
    assert alt_text("blue shoe", "s3://b/shard-1.tar#deep/blue_shoe.png")[1] == "file_name"


def catalog_of(folder: Path, captions: dict[str, str]) -> CatalogConfig:
    """A catalog whose images have these captions; names with equal first letters are equal bytes."""
    catalog = open_catalog(folder)
    for number, (name, caption) in enumerate(captions.items()):
        asked = request()
        with catalog.plan([references([name])], asked) as plan:
            writer = catalog.writer(constants(f"r{number}", asked), plan.version)
            for planned in plan.batches():
                rows = finish(planned, caption=caption)
                hashes = [f"bytes {row['uri'].removeprefix('mem://')[0]}" for row in rows.to_pylist()]
                at = rows.schema.get_field_index("content_hash")
                rows = rows.set_column(at, "content_hash", [hashes])
                catalog.commit(f"r{number}", writer.write(rows))
    return CatalogConfig(uri=str(folder))


def test_the_catalog_tells_which_texts_are_shared(tmp_path: Path) -> None:
    captions = {"a1": "a red car here", "a2": "a red car here", "b1": "A red car here", "c1": "a house by the sea"}
    config = catalog_of(tmp_path, {**captions, "d1": "a dog", "e1": "a tree on a hill", "e2": "a tree on a hill"})
    report = find_alt_texts(config)
    assert report.rules == {"duplicate": 3, "too_short": 1}
    assert [text.uri for text in report.broken] == ["mem://a1", "mem://a2", "mem://b1", "mem://d1"]
    assert (report.num_images, report.num_without) == (7, 0)
    without = find_alt_texts(config, where="uri != 'mem://b1'")
    assert without.rules == {"too_short": 1}, "equal bytes may share a text"
    found = broken_alt_texts(config)
    lines = "".join(alt_texts_csv(found)).splitlines()
    assert lines[1].startswith("duplicate,A red car here.,a red car here,mem://a1,")
    assert len(lines) == 5
    assert AltTextReport.model_validate_json("".join(found.as_json())) == report
    console = Console(record=True, width=120)
    print_alt_texts(found, console)
    assert "3 of 7 images have an alternative text that keeps every rule" in console.export_text()
    # `show` counts what the rows say, and must not seem to say the same.
    assert summarize(config).alt_texts == {"keeps every rule of a single image": 6, "too_short": 1}


def test_rows_that_keep_every_rule_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = catalog_of(tmp_path, {"a1": "a house by the sea", "b1": "a tree on a hill", "c1": "a dog"})
    monkeypatch.setattr(alt_text_report, "_SLICE_ROWS", 1)
    held: list[int] = []
    concat_tables = pa.concat_tables

    def watched(tables: Sequence[pa.Table]) -> pa.Table:
        held.append(sum(table.num_rows for table in tables))
        return concat_tables(tables)

    monkeypatch.setattr(alt_text_report.pa, "concat_tables", watched)
    found = broken_alt_texts(config, where="uri != 'mem://b1'")
    monkeypatch.undo()
    assert held == [1]
    assert (found.counts.num_images, found.counts.rules, found.counts.broken) == (2, {"too_short": 1}, ())
    assert [text["uri"] for text in found.texts()] == ["mem://c1"]
    assert "".join(found.as_json()) == find_alt_texts(config, where="uri != 'mem://b1'").model_dump_json()


def test_rows_carry_the_text_and_lose_it_with_their_caption(tmp_path: Path) -> None:
    catalog_of(tmp_path, {"a1": "a photo of a red car", "b1": "a dog"})
    rows = rows_by_name(open_catalog(tmp_path))
    assert (rows["a1"]["alt_text"], rows["a1"]["alt_text_rule"]) == ("A red car.", None)
    assert (rows["b1"]["alt_text"], rows["b1"]["alt_text_rule"]) == ("A dog.", "too_short")
