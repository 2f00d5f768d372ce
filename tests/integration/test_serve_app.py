"""The app as a person uses it: lists, filters, pages, pictures, hostile texts, search; asked without a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.hostile import HOSTILE
from tests.images import png_bomb
from tests.report_samples import label, labels_of, put_rows
from tests.web_samples import (
    DECISIONS,
    NUM,
    Served,
    by_id,
    serving,
    shown_ids,
    small_catalog,
    text_of,
)
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.views_search import printable
from vlmflow.web.desk import PAGE_SIZE

# Lists, filters, pages


def test_the_first_page_shows_every_row_and_counts(read_only: Served) -> None:
    page = read_only.browser().get("/").text
    assert sorted(shown_ids(page)) == sorted(by_id(read_only))
    assert f"{NUM} images" in text_of(page)
    for decision in DECISIONS:
        assert re.search(rf'decision={decision}[^>]*><span class="what">{decision}</span> <span class="count">8<', page)
    assert re.search(r'weapons/gun</span> <span class="count">16<', page)


@pytest.mark.parametrize(
    ("query", "condition"),
    [
        ("decision=block", lambda row: row["decision"] == "block"),
        ("decision=block&decision=review", lambda row: row["decision"] != "allow"),
        ("label=weapons%2Fgun&decision=review", lambda row: row["decision"] == "review"),
        ("find=0007", lambda row: "0007" in row["uri"]),
        ("where=text_itm+%3C+0", lambda row: False),
        ("where=decision+%3D+%27allow%27+AND+width+%3D+64", lambda row: row["decision"] == "allow"),
        ("status=failed", lambda row: False),
        ("date=2026-03-01&verdict=nobody", lambda row: True),
        ("decision=no+such", lambda row: False),
    ],
)
def test_filters_leave_the_rows_that_fit(read_only: Served, query: str, condition: Any) -> None:
    page = read_only.browser().get(f"/?{query}")
    assert page.status_code == 200
    expected = sorted(image_id for image_id, row in by_id(read_only).items() if condition(row))
    assert sorted(shown_ids(page.text)) == expected


def test_a_click_on_a_filter_leaves_as_many_images_as_stand_beside_it(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    lost = [{"stage": "read", "class": "truncated", "message": ""}]
    put_rows(
        config, ["a", "b", "c"], errors=[None, lost, None], status=["ok", "partial", "ok"],
        policy_name=["demo", "demo", None], decision=["allow", "review", "review"],
    )  # fmt: skip
    with serving(config) as served:
        browser = served.browser()
        page = browser.get("/").text
        choices = re.findall(r'<a href="([^"]+)"><span class="what">([^<]*)</span> <span class="count">(\d)<', page)
        assert {name: count for _, name, count in choices if name in ("no error", "not moderated")} == {
            "no error": "2", "not moderated": "1",
        }  # fmt: skip
        for href, name, count in choices:
            assert f"{count} image{'' if count == '1' else 's'}" in text_of(browser.get(unescape(href)).text), name
        assert "Only error no error. " in text_of(browser.get("/review?error=").text)


@pytest.mark.parametrize(
    "query",
    ["where=bad(", "where=1%3D1)+UNION+SELECT+(1", "where=x;DROP+TABLE+y", "sort=size", "where=" + "x" * 5000],
)
def test_what_cannot_be_filtered_by_is_said_in_a_sentence(read_only: Served, query: str) -> None:
    answer = read_only.browser().get(f"/?{query}")
    assert answer.status_code == 400
    assert "That is not possible" in answer.text
    assert query.startswith("sort") or "<p>Condition in SQL " in answer.text
    assert "Traceback" not in answer.text


def test_conditions_see_no_files(read_only: Served) -> None:
    answer = read_only.browser().get("/", params={"where": "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0"})
    assert answer.status_code == 400
    assert "root:" not in answer.text


@pytest.mark.parametrize("sort", ["new", "near", "match", "random"])
def test_pages_follow_each_other_forth_and_back_without_gaps(tmp_path: Path, sort: str) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    random, count = np.random.default_rng(0), 2 * PAGE_SIZE + 10
    for part in range(3):  # equal values across files, where an order is decided by the id
        put_rows(
            config, [f"p{part}-{number}" for number in range(count)], run=f"r{part}",
            text_itm=random.integers(0, 4, count) / 4, decision=["allow", "block"] * (count // 2),
            labels=labels_of([[label("gun", 0.5 + value / 10, "allow")] for value in random.integers(0, 3, count)]),
        )  # fmt: skip
    with serving(config) as served:
        browser = served.browser()
        address, pages = f"/?sort={sort}&decision=block", []
        while address:
            page = browser.get(address).text
            pages.append(shown_ids(page))
            following = re.search(r'rel="next" href="([^"]+)"', page)
            address = "" if following is None else following[1].replace("&amp;", "&")
        forth = [image_id for page in pages for image_id in page]
        assert len(forth) == len(set(forth)) == 3 * count // 2
        assert [len(page) for page in pages[:-1]] == [PAGE_SIZE] * (len(pages) - 1)
        rows = by_id(served)
        if sort == "match":
            scores = [rows[image_id]["text_itm"] for image_id in forth]
            assert scores == sorted(scores)
        back = pages[-1:]
        while (before := re.search(r'rel="prev" href="([^"]+)"', page)) is not None:
            page = browser.get(before[1].replace("&amp;", "&")).text
            back.insert(0, shown_ids(page))
        assert [image_id for shown in back for image_id in shown] == forth


def test_a_page_behind_an_image_that_is_gone_is_the_first_and_says_so(read_only: Served) -> None:
    page = read_only.browser().get("/?after=" + "0" * 32).text
    assert len(shown_ids(page)) == NUM
    assert "not in the catalog any more" in page


def test_where_the_rows_of_a_page_have_left_the_filter_its_neighbour_is_shown(tmp_path: Path) -> None:
    config, count = CatalogConfig(uri=str(tmp_path / "catalog")), PAGE_SIZE + 5
    put_rows(config, [f"p{number}" for number in range(count)])
    with serving(config) as served:
        browser, ids = served.browser(), sorted(by_id(served))
        first = browser.get(f"/?before={ids[0]}").text
        assert (shown_ids(first), 'rel="prev"' in first, 'rel="next"' in first) == (ids[:PAGE_SIZE], False, True)
        last = browser.get(f"/?after={ids[-1]}").text
        assert (shown_ids(last), 'rel="prev"' in last, 'rel="next"' in last) == (ids[-PAGE_SIZE:], True, False)
        nothing = browser.get(f"/?after={ids[3]}&where=false").text
        assert (shown_ids(nothing), "Nothing fits." in text_of(nothing)) == ([], True)


def test_each_score_of_a_label_has_its_own_map(served: Served) -> None:
    scored = [label("gun", 0.6, "review"), label("gun", 0.9, "block") | {"detector": "finder"}]
    put_rows(served.config, ["new"], run="run-9", uri=["mem://new.jpg"], labels=labels_of([scored]))
    served.desk.shelf.refresh()
    row = served.rows()["new.jpg"]
    page = served.browser().get(f"/image/{row['image_id']}").text
    maps = re.findall(r'data-map="[^"?]*\?label=([^"&]+)&amp;v=hash%20of%20new[^"]*" aria-label="([^"]+)"', page)
    assert maps == [("gun%20%28finder%29", "show the map of gun (finder)"), ("gun", "show the map of gun")]


def test_answers_are_shown_with_their_questions_and_scores(served: Served) -> None:
    answers = [{"question": "Is it a bag?", "answer": "yes", "score": 0.75}, {"question": "Whose?", "answer": None}]
    put_rows(served.config, ["new"], run="run-9", uri=["mem://new.jpg"], answers=[answers])
    served.desk.shelf.refresh()
    page = served.browser().get(f"/image/{served.rows()['new.jpg']['image_id']}").text
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)<", line) for line in page.splitlines() if 'scope="row"' in line]
    assert cells == [["Is it a bag?", "yes", "0.750"], ["Whose?", "–", "–"]]
    assert "{&#39;question&#39;" not in page


def test_new_rows_are_shown_when_the_table_has_them(served: Served) -> None:
    browser = served.browser()
    browser.get("/")
    put_rows(served.config, ["new"], run="run-9", uri=["mem://brand-new.jpg"])
    served.desk.shelf.refresh()
    assert "brand-new.jpg" in browser.get("/").text
    assert f"{NUM + 1} images" in text_of(browser.get("/").text)


def test_an_empty_catalog_has_pages(tmp_path: Path) -> None:
    import pyarrow as pa

    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    Catalog.open_or_create(config, pa.schema([]))
    with serving(config) as served:
        browser = served.browser()
        assert "Nothing fits" in browser.get("/").text
        assert "Nothing is left" in browser.get("/review").text


# One image


def test_the_page_of_an_image_holds_all_its_columns_and_evidence(read_only: Served) -> None:
    row = next(row for row in by_id(read_only).values() if row["decision"] == "block")
    page = read_only.browser().get(f"/image/{row['image_id']}").text
    shown = text_of(page)
    for name, value in row.items():
        if isinstance(value, str):
            assert value in shown, name
    for name in row.keys() - {"labels", "detections", "answers", "errors", "verdict", "source"}:
        assert f"<dt>{name}</dt>" in page
    gun = row["labels"][0]
    assert f"{gun['score']:.3f}" in shown
    assert f"{gun['review_threshold']:.2f}" in shown
    assert row["source"]["title"] in shown
    assert "map" in shown


def test_pictures_of_flagged_images_are_blurred_unless_asked_for(read_only: Served) -> None:
    browser = read_only.browser()
    for row in by_id(read_only).values():
        answers = [browser.get(f"/picture/{row['image_id']}{query}") for query in ("", "?show=1")]
        assert [answer.headers["content-type"] for answer in answers] == ["image/jpeg"] * 2
        details = [_detail(answer.content) for answer in answers]
        assert details[1] > 20  # noise
        assert (details[0] > 20) == (row["decision"] == "allow")
        with Image.open(io.BytesIO(answers[0].content)) as picture:
            assert picture.size == (256, 192)  # in the shape of the row, 64 x 48


def _detail(data: bytes) -> float:
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("L"), np.float32)
    return float(np.abs(np.diff(pixels, axis=1)).mean() * 10)


def test_a_picture_that_cannot_be_had_says_why_and_is_not_kept(tmp_path: Path) -> None:
    config = small_catalog(tmp_path)
    rows = Catalog.open(config).images(["image_id", "uri"]).to_pylist()
    Path(rows[0]["uri"]).unlink()
    Path(rows[1]["uri"]).write_bytes(b"\x89PNG other bytes")
    Path(rows[2]["uri"]).write_bytes(png_bomb())
    with serving(config) as served:
        for row in rows[:3]:
            answer = served.browser().get(f"/picture/{row['image_id']}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("image/svg+xml")
            assert answer.headers["cache-control"] == "no-store"
            assert str(tmp_path) not in answer.text


def test_an_image_that_was_never_read_says_why_and_offers_nothing_that_fails(served: Served) -> None:
    errors = [[{"stage": "decode", "class": "not_an_image", "message": "a text"}]]
    put_rows(
        served.config, ["broken"], run="run-9", uri=["/broken.jpg"], content_hash=[None], status=["unreadable"],
        decision=["review"], errors=errors, embed_run_id=[None], embed_fingerprint=[None],
    )  # fmt: skip
    served.desk.shelf.refresh()
    browser, row = served.browser().review_as("ada"), served.rows()["broken.jpg"]
    image_id = row["image_id"]
    assert "not_an_image" in browser.get(f"/picture/{image_id}").text
    page, queue = (browser.get(path).text for path in (f"/image/{image_id}", f"/review?at={image_id}"))
    for shown in (page, queue):
        assert "could not be read: not_an_image. So nobody can judge it" in shown
        assert "data-decision" not in shown
        assert "Flagged: show" not in shown
    assert f"/review?at={image_id}" not in page
    assert f"/?like={image_id}" not in page
    assert 'id="skip"' in queue
    assert "not_an_image" in browser.judge(row, "allow", content_hash="").json()["error"]
    for at in ("", f"&after={image_id}"):  # nobody has judged it, nobody looks at it, and it was not passed over
        end = text_of(browser.get(f"/review?status=unreadable{at}").text)
        assert "Nothing is left to decide here" in end
        assert "1 image could not be read: nobody can judge it." in end
        assert not re.search("Every image|else is looking|passed over|Begin again", end)


# What comes from outside


def test_hostile_texts_are_text_everywhere(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / '"><img src=x onerror=alert(1)>'))
    texts = [text for name, text in HOSTILE.items() if name != "surrogate"]  # no valid UTF-8: no table holds it
    put_rows(
        config, [f"h{number}" for number in range(len(texts))], uri=texts, key=texts, caption=texts, title=texts,
        format=texts, status=texts, decision=["allow", *texts[1:]], decision_reason=texts, policy_name=texts,
        policy_version=texts, errors=[[{"stage": text, "class": text, "message": text}] for text in texts],
        labels=labels_of([[label(text, 0.7, text, text)] for text in texts]),
    )  # fmt: skip
    with serving(config) as served:
        browser = served.browser()
        pages = [browser.get(f"/image/{image_id}").text for image_id in by_id(served)]
        pages += [browser.get(path).text for path in ("/", "/review", "/review?sort=random")]
        pages += [browser.get("/", params={name: text}).text for text in texts[:6] for name in ("q", "find", "label")]
        for page in pages:
            assert len(re.findall("<script", page)) == 1
            for tag in re.findall(r"<[a-z][^>]*>", page):
                assert not re.search(r"\son[a-z]+\s*=|javascript:|srcdoc", re.sub(r'"[^"]*"', '""', tag))
            for address in re.findall(r'(?:href|src|action)="([^"]*)"', page):
                assert address.startswith("/") or address == "#main"
            assert "\u202e" not in page
            assert "<img src=x" not in page
        whole = "".join(map(text_of, pages))
        for text in texts:
            assert printable(text) in whole or text == HOSTILE["long"]
        assert HOSTILE["long"] in whole


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_queries_and_reasons_are_taken_as_text(served: Served, text: str) -> None:
    browser = served.browser().review_as("ada")
    row = next(iter(by_id(served).values()))
    sent = text.encode("utf-8", "replace").decode()
    for name in ("find", "after", "before", "sort", "image", "like", "n"):
        assert browser.get("/", params={name: sent}).status_code in (200, 400)
    answer = browser.judge(row, "block", reason=sent, labels={sent[:100]: True})
    assert answer.status_code == (400 if len(sent) > 2_000 else 200)
    page = browser.get(f"/image/{row['image_id']}").text
    assert "<script>alert" not in page
    assert "<img src=x" not in page


# Query images


def test_an_upload_beyond_the_limit_is_refused_before_it_is_read_whole(
    read_only: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(30):
            sent += 1024 * 1024
            yield bytes(1024 * 1024)

    answer = read_only.browser().write("/query-image", content=parts())
    assert answer.status_code == 413
    assert "20 MiB" in answer.json()["error"]
