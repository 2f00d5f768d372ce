"""Queues as CSV: no cell starts a formula, nobody judges in the name of a list, and a file counts from its own time."""

from __future__ import annotations

import csv
import datetime as dt
import io
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.hostile import HOSTILE
from tests.web_samples import small_catalog
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.errors import ReviewError
from vlmflow.moderation.queue import QUEUE, QueueSizes
from vlmflow.moderation.review_files import Word, read_words, write_queue
from vlmflow.moderation.verdicts import read_verdicts
from vlmflow.review import export_queue, import_verdicts
from vlmflow.views_moderation import print_review


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@sum(1)", "|x", "\t=1", "\n=1", "＝1", HOSTILE["formula"]])
def test_no_cell_of_a_queue_starts_a_formula(tmp_path: Path, start: str) -> None:
    texts = {field.name: start for field in QUEUE if field.type == pa.string()}
    write_queue(tmp_path / "queue.csv", pa.Table.from_pylist([texts], schema=QUEUE))
    with (tmp_path / "queue.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    for name in texts:
        assert row[name] == f"'{start}", name


def test_nobody_judges_in_the_name_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    file.write_text(f"image_id,verdict,reviewer\n{'0' * 32},allow,list:banned\n")
    with pytest.raises(ReviewError, match="list of known images"):
        read_words(file, None, dt.datetime.now(dt.UTC))


def words_of(path: Path, text: str) -> list[Word]:
    path.write_text(text, encoding="utf-8")
    return read_words(path, "ada", dt.datetime.now(dt.UTC))[0]


def test_weights_are_numbers_whatever_they_are_written_as(tmp_path: Path) -> None:
    table = pa.table({"image_id": ["a", "b", "c"], "verdict": ["allow"] * 3, "weight": ["1234.5", " ", None]})
    pq.write_table(table, tmp_path / "verdicts.parquet")
    words, _ = read_words(tmp_path / "verdicts.parquet", "ada", dt.datetime.now(dt.UTC))
    assert [word.weight for word in words] == [1234.5, None, None]
    words = words_of(tmp_path / "verdicts.csv", 'image_id,verdict,weight\na,allow,"1234.5"\nb,allow,\n')
    assert [word.weight for word in words] == [1234.5, None]


@pytest.mark.parametrize("weight", ["-1", "0", "inf", "1e999", "many", '"1.234,5"'])
def test_a_weight_that_is_no_number_above_0_is_refused(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ReviewError, match=r"verdicts.csv, row 2: weight ") as caught:
        words_of(tmp_path / "verdicts.csv", f"image_id,verdict,weight\na,,{weight}\nb,allow,{weight}\n")
    assert caught.value.remedy == "Write a number above 0, or nothing."


@pytest.mark.parametrize(
    ("delimiter", "end", "weight"),
    [(";", "\r\n", "12,5"), (";", "\n", "12.5"), ("\t", "\r\n", "12.5"), (",", "\r", "12.5")],
)
def test_a_file_is_read_as_spreadsheets_save_it(tmp_path: Path, delimiter: str, end: str, weight: str) -> None:
    """With a mark at its start, the separators of their country, and columns as people retype and move them."""
    rows = [
        ["Weight", "Value", " Verdict", "uri", "image_id", "label"],
        [weight, "TRUE", "Allow", "a,b;c", "f" * 32, "gun"],
    ]
    text = "\ufeff" + "".join(delimiter.join(f'"{cell}"' for cell in row) + end for row in rows)
    (word,) = words_of(tmp_path / "verdicts.csv", text)
    assert (word.decision, word.label, word.value, word.weight, word.image) == ("allow", "gun", True, 12.5, "f" * 32)
    (verdict,) = read_verdicts(tmp_path / "verdicts.csv").verdicts
    assert (verdict.label, verdict.value, verdict.weight, verdict.image) == ("gun", True, 12.5, "f" * 32)


def test_a_column_that_stands_twice_and_other_letters_than_utf_8_are_said(tmp_path: Path) -> None:
    with pytest.raises(ReviewError, match="the column verdict stands twice"):
        words_of(tmp_path / "verdicts.csv", f"image_id,verdict,Verdict\n{'f' * 32},allow,block\n")
    (tmp_path / "verdicts.csv").write_bytes("image_id;verdict;reason\nf;allow;schön\n".encode("cp1252"))
    with pytest.raises(ReviewError, match="invalid UTF8") as caught:
        read_words(tmp_path / "verdicts.csv", "ada", dt.datetime.now(dt.UTC))
    assert "CSV UTF-8" in caught.value.remedy


def test_a_large_file_may_have_line_breaks_in_its_cells(tmp_path: Path) -> None:
    rows = "".join(f'{number:032x},allow,"{"a reason " * 8}\nof two lines"\n' for number in range(20_000))
    words = words_of(tmp_path / "verdicts.csv", f"image_id,verdict,reason\n{rows}")
    assert (tmp_path / "verdicts.csv").stat().st_size > 1 << 20
    assert len(words) == 20_000
    assert (words[-1].reason or "").endswith("\nof two lines")


def test_a_label_whose_value_was_forgotten_is_counted_and_what_else_the_row_says_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    path.write_text("image_id,verdict,label,value\na,,knife,\nb,block,knife,\nc,,knife,true\nd,,,\ne,allow,,\n")
    words, left_out = read_words(path, "ada", dt.datetime.now(dt.UTC))
    said = [(word.image, word.decision, word.label, word.value) for word in words]
    assert said == [("b", "block", None, None), ("c", None, "knife", True), ("e", "allow", None, None)]
    assert left_out == {"label without a value: write true or false": 2}


MONDAY, TUESDAY, WEDNESDAY = (dt.datetime(2026, 3, day, 10, tzinfo=dt.UTC) for day in (2, 3, 4))


@pytest.fixture
def catalog(tmp_path: Path) -> CatalogConfig:
    return small_catalog(tmp_path, 3)


def filled_in(folder: Path, when: dt.datetime, row: dict[str, str], *more: dict[str, str]) -> Path:
    """A queue as people send it back: without times of its own."""
    path = folder / f"{when:%A}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row, *more])
    os.utime(path, (when.timestamp(), when.timestamp()))
    return path


def row_of(catalog: CatalogConfig, number: int = 0) -> dict[str, str]:
    return Catalog.open(catalog).images(["image_id", "content_hash", "decision"]).slice(number, 1).to_pylist()[0]


def said(catalog: CatalogConfig, verdict: str, reviewer: str = "ada", number: int = 0) -> dict[str, str]:
    row = row_of(catalog, number)
    return {name: row[name] for name in ("image_id", "content_hash")} | {"verdict": verdict, "reviewer": reviewer}


def test_a_file_that_comes_again_brings_no_older_verdict_back(catalog: CatalogConfig, tmp_path: Path) -> None:
    monday = filled_in(tmp_path, MONDAY, said(catalog, "allow"))
    tuesday = filled_in(tmp_path, TUESDAY, said(catalog, "block", "bob"))
    for file in (monday, tuesday):
        assert import_verdicts(catalog, file).num_new == 1
    copy = shutil.copyfile(monday, tmp_path / "copy.csv")  # of now
    more = filled_in(tmp_path, WEDNESDAY, said(catalog, "allow"), said(catalog, "allow", number=1))
    overruled = {"said before, and somebody has decided otherwise since: fill in `at` to say it again": 1}
    for file, num_new in ((monday, 0), (copy, 0), (more, 1), (more, 0)):
        report = import_verdicts(catalog, file)
        assert (report.num_new, report.left_out) == (num_new, overruled)
        assert row_of(catalog)["decision"] == "block"
    assert import_verdicts(catalog, tuesday).left_out == {}, "what still counts is no news"
    again = said(catalog, "allow") | {"at": WEDNESDAY.isoformat()}
    assert import_verdicts(catalog, filled_in(tmp_path, WEDNESDAY, again)).num_new == 1
    assert row_of(catalog)["decision"] == "allow"


def test_of_two_people_who_differ_in_one_file_the_gravest_counts_until_it_says_who_came_last(
    catalog: CatalogConfig, tmp_path: Path
) -> None:
    by_model = row_of(catalog)["decision"]
    assert by_model != "allow"
    ada, bob = said(catalog, "allow"), said(catalog, "block", "bob")
    agreed = [said(catalog, "block", name, 1) for name in ("ada", "bob")]
    report = import_verdicts(catalog, filled_in(tmp_path, MONDAY, bob, ada, *agreed))
    assert report.left_out == {"another row of the file says otherwise, and neither is newer: fill in `at`": 1}
    assert (report.num_new, row_of(catalog)["decision"], row_of(catalog, 1)["decision"]) == (3, "block", "block")
    times = [ada | {"at": WEDNESDAY.isoformat()}, bob | {"at": TUESDAY.isoformat()}]
    assert import_verdicts(catalog, filled_in(tmp_path, WEDNESDAY, *times)).left_out == {}
    assert row_of(catalog)["decision"] == "allow"
    withdrawn = filled_in(tmp_path, WEDNESDAY + dt.timedelta(1), ada, said(catalog, "none", "bob"))
    assert import_verdicts(catalog, withdrawn).num_new == 1
    assert row_of(catalog)["decision"] == by_model, "who takes a word back leaves it to the models, who may block"
    labels = [ada | {"verdict": "", "label": "gun", "value": value} for value in ("true", "false")]
    assert import_verdicts(catalog, filled_in(tmp_path, WEDNESDAY, *labels)).num_verdicts == 0


def test_files_count_by_when_they_were_changed_not_by_when_they_are_imported(
    catalog: CatalogConfig, tmp_path: Path
) -> None:
    import_verdicts(catalog, filled_in(tmp_path, TUESDAY, said(catalog, "block"), said(catalog, "allow", number=1)))
    older = said(catalog, "allow"), said(catalog, "allow", "bob", number=1), said(catalog, "block", number=2)
    report = import_verdicts(catalog, filled_in(tmp_path, MONDAY, *older))
    assert row_of(catalog)["decision"] == "block"
    assert (report.num_new, report.num_outdated) == (3, 1), "who says the same, or is alone, is not overruled"
    console = Console(file=io.StringIO(), width=200)
    print_review(report, console)
    assert "without effect 1: the catalog has a newer verdict that says otherwise" in console.file.getvalue()
    events = Catalog.open(catalog).reviews.events()
    assert events["at"].to_pylist() == [MONDAY] * 3 + [TUESDAY] * 2


def test_a_file_of_a_clock_that_is_ahead_is_of_now(catalog: CatalogConfig, tmp_path: Path) -> None:
    ahead = filled_in(tmp_path, dt.datetime(2999, 1, 1, tzinfo=dt.UTC), said(catalog, "block"))
    assert import_verdicts(catalog, ahead).num_new == 1
    assert import_verdicts(catalog, ahead).num_new == 0
    (at,) = Catalog.open(catalog).reviews.events()["at"].to_pylist()
    assert at <= dt.datetime.now(dt.UTC)


def test_an_image_with_labels_alone_keeps_its_decision_and_is_not_exported_again(
    catalog: CatalogConfig, tmp_path: Path
) -> None:
    base = {name: said(catalog, "")[name] for name in ("image_id", "content_hash", "reviewer")}
    import_verdicts(catalog, filled_in(tmp_path, MONDAY, base | {"label": "gun", "value": "true"}))
    report = export_queue(catalog, tmp_path / "next.parquet", sizes=QueueSizes(9, 9, 9))
    assert (report.num_images, report.num_labelled) == (2, 1)
    queue = pq.read_table(tmp_path / "next.parquet").to_pylist()
    assert base["image_id"] not in {row["image_id"] for row in queue}
    assert {row["weight"] for row in queue} == {1.0}


def test_a_label_that_was_taken_back_does_not_return_with_an_old_file(catalog: CatalogConfig, tmp_path: Path) -> None:
    base = {name: said(catalog, "allow")[name] for name in ("image_id", "content_hash", "reviewer")}
    old = filled_in(tmp_path, MONDAY, base | {"label": "gun", "value": "true"})
    import_verdicts(catalog, old)
    import_verdicts(catalog, filled_in(tmp_path, TUESDAY, base | {"label": "gun", "value": "false"}))
    copy = shutil.copyfile(old, tmp_path / "copy.csv")
    assert sum(import_verdicts(catalog, copy).left_out.values()) == 1
    assert Catalog.open(catalog).reviews.events()["value"].to_pylist() == [True, False]


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ', "\ufeff[]", "9" * 5000])
def test_what_label_studio_has_not_exported_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReviewError, match=r"tasks\.json is no JSON file") as caught:
        read_words(path, "ada", dt.datetime.now(dt.UTC))
    assert caught.value.remedy == "Export from Label Studio as JSON."
