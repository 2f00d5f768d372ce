"""Whatever stands in a field from outside is shown as text: on the terminal, in CSV and in HTML."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.catalog_samples import config_of
from tests.hostile import HOSTILE
from tests.search_samples import clustered, names, put
from vlmflow.search.duplicates import DuplicateReport, Group, Member
from vlmflow.search.page import search_html
from vlmflow.search.query import Query
from vlmflow.search.results import Hit, SearchResult
from vlmflow.search.searcher import search_images
from vlmflow.search.thumbnails import Thumbnail
from vlmflow.search.titles import Title, TitleReport
from vlmflow.views_search import (
    duplicates_csv,
    print_duplicates,
    print_search,
    print_titles,
    printable,
    search_csv,
    titles_csv,
)

PICTURE = Thumbnail("data:image/jpeg;base64,AAAA")
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "p",
    "ol",
    "li",
    "div",
    "span",
    "dl",
    "dt",
    "dd",
    "img",
    "a",
}


def hit(text: str, **given: object) -> Hit:
    values = {"rank": 1, "score": 0.5, "decision": "allow", "decision_reason": text, "caption": text, "status": "ok"}
    return Hit.model_validate(
        {**values, "image_id": "0" * 32, "uri": text, "key": text, "ingest_date": "2026-03-01", **given}
    )


def result(*hits: Hit, text: str = "bag") -> SearchResult:
    counts = {"num_rows": 1, "num_matching": 1, "num_indexed": 0}
    return SearchResult(
        query=text, where=text, top_k=1, model=text, catalog=text, images_version=1, embeddings_version=1,
        notes=(text,), hits=hits, **counts,
    )  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_page_shows_it_as_text(text: str) -> None:
    page = search_html(result(hit(text), hit(text, decision=text), text=text), [Thumbnail(None, text), PICTURE])
    parsed = Page(page)
    assert {tag for tag, _ in parsed.elements} <= TAGS
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert (attributes.get("href") or "https://").startswith(("http://", "https://"))
    assert parsed.text.count(printable(text)) >= 8  # every field, in full
    assert "\u202e" not in page
    page.encode("utf-8")


def test_a_page_loads_and_runs_nothing() -> None:
    elements = Page(search_html(result(hit("a")), [PICTURE])).elements
    policy = next(a["content"] for t, a in elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not any(attributes.get("style") for _, attributes in elements)


def test_http_addresses_alone_are_links_and_those_of_flagged_images_are_not() -> None:
    uri = "https://shop.example/a.jpg?x=1&y=2"
    links = [a["href"] for t, a in Page(search_html(result(hit("x", uri=uri)), [PICTURE])).elements if t == "a"]
    assert links == [uri]
    for other in ("s3://bucket/a.jpg", "/home/a.jpg", "javascript:alert(1)", "http:alert(1)", "https://[::1/x"):
        assert "<a" not in search_html(result(hit("x", uri=other)), [PICTURE])
    flagged = result(hit("x", uri=uri, decision="block"))
    assert "<a" not in search_html(flagged, [PICTURE])
    assert "<a" in search_html(flagged, [PICTURE], show_flagged=True)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_terminal_shows_it_as_text(text: str) -> None:
    sink = io.StringIO()
    console = Console(file=sink, width=100_000, force_terminal=False)
    member = Member(image_id="0" * 32, uri=text, decision=text, similarity=1.0)
    groups = (Group(kind="semantic", members=(member, member)),)
    report = DuplicateReport(
        catalog=text, images_version=1, threshold=0.9, num_images=2, num_duplicates=1, groups=groups
    )
    values = {"decision": text, "text": text, "text_column": "t", "caption": text, "text_itm": 0.1, "text_itc": None}
    title = Title.model_validate({"rank": 1, "image_id": "0" * 32, "uri": text, **values})
    print_search(result(hit(text), text=text), console)
    print_duplicates(report, console)
    print_titles(TitleReport(catalog=text, images_version=1, num_scored=1, titles=(title,)), console)
    shown = sink.getvalue()
    assert not any(character in shown for character in "\x00\x1b\x07\u202e\u2066\u200f")
    if len(text) < 200:
        assert shown.count(printable(text).strip()) >= 7
    else:
        assert "(10,000 characters)" in shown


def test_a_ranking_by_cosines_is_told_as_one() -> None:
    values = {"decision": "allow", "text": "a cat", "text_column": "t", "caption": None, "text_itm": None}
    title = Title.model_validate({"rank": 1, "image_id": "0" * 32, "uri": "u", "text_itc": 0.0512, **values})
    titles = TitleReport(
        catalog="c", images_version=1, ranked_by="text_itc", num_scored=3, num_left_out=1_200, titles=(title,)
    )
    sink = io.StringIO()
    print_titles(titles, Console(file=sink, width=200, force_terminal=False))
    shown = sink.getvalue()
    assert "cosine" in shown.splitlines()[0]
    assert "0.051" in shown
    assert "no probability: the model has no matching head" in shown
    assert "1,200 rows have a score of another model" in shown
    assert ",0.0512," in titles_csv(titles)


@pytest.mark.parametrize(("threshold", "said"), [(0.9, "; semantic ones from a cosine of 0.9"), (None, "")])
def test_the_cosine_is_told_where_semantic_groups_were_looked_for(threshold: float | None, said: str) -> None:
    sink = io.StringIO()
    report = DuplicateReport(catalog="c", images_version=1, threshold=threshold, num_images=2, num_duplicates=0)
    print_duplicates(report, Console(file=sink, width=100, force_terminal=False))
    assert sink.getvalue().strip() == f"0 of 2 images are duplicates, in 0 groups{said}"


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "|", "%", "＝", "＋", "－", "＠", "\ufeff="]
)
def test_no_cell_starts_a_formula(start: str) -> None:
    text = f"{start}cmd|' /C calc'!A0"
    member = Member(image_id="0" * 32, uri=text, decision=text, similarity=0.99)
    groups = (Group(kind="exact", members=(member, member)),)
    report = DuplicateReport(
        catalog=text, images_version=1, threshold=0.9, num_images=2, num_duplicates=1, groups=groups
    )
    values = {"decision": text, "text": text, "text_column": text, "caption": text, "text_itm": 0.1, "text_itc": 0.2}
    title = Title.model_validate({"rank": 1, "image_id": "0" * 32, "uri": text, **values})
    titles = TitleReport(catalog=text, images_version=1, num_scored=1, titles=(title,))
    for written in (duplicates_csv(report), search_csv(result(hit(text))), titles_csv(titles)):
        rows = list(csv.reader(io.StringIO(written, newline="")))
        cells = [cell for row in rows for cell in row]
        assert f"'{text}" in cells
        assert not any(cell.startswith(tuple("=+-@|%\t\r\n ＝＋－＠\ufeff")) for cell in cells)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_csv_keeps_the_text(text: str) -> None:
    written = search_csv(result(hit(text)))
    row = next(csv.DictReader(io.StringIO(written, newline="")))
    if text.isprintable() and not text.startswith("="):
        assert row["uri"] == row["caption"] == row["decision_reason"] == text
    written.encode("utf-8")
    assert "\x00" not in written


def test_a_search_that_finds_nothing_has_the_columns_of_one_that_does() -> None:
    assert search_csv(result()).splitlines() == search_csv(result(hit("a"))).splitlines()[:1]


def test_hostile_values_come_through_a_catalog(tmp_path: Path) -> None:
    texts = [text for text in HOSTILE.values() if text != HOSTILE["surrogate"]]  # which no Parquet file holds
    count = len(texts)
    put(tmp_path, names(count), clustered(count), uri=texts, caption=texts, decision_reason=texts, key=texts)
    found = search_images(config_of(tmp_path), Query(like=HOSTILE["script"]), top_k=50)
    assert {one.caption for one in found.hits} == set(texts) - {HOSTILE["script"]}
    assert "<script" not in search_html(found, [PICTURE] * len(found.hits))
