"""Search in the app: by text, by an image of the catalog, by a file of one's own; asked without a browser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.images import png_bomb
from tests.report_samples import put_rows
from tests.web_samples import (
    NUM,
    Served,
    by_id,
    serving,
    shown_ids,
    small_catalog,
    starter_catalog,
    text_of,
)
from vlmflow.catalog import Catalog


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(starter_catalog(tmp_path_factory.mktemp("search"))) as served:
        yield served


def test_an_image_is_found_by_its_like_within_the_filters(starter: Served) -> None:
    browser, rows = starter.browser(), by_id(starter)
    image_id = next(image_id for image_id, row in rows.items() if row["decision"] == "allow")
    page = browser.get(f"/?like={image_id}&decision=review").text
    assert sorted(shown_ids(page)) == sorted(key for key, row in rows.items() if row["decision"] == "review")
    assert image_id not in shown_ids(browser.get(f"/?like={image_id}").text)
    assert "cosine" in page
    assert "Review these" not in page, "the queue knows no query"
    assert "Review these" in browser.get("/?decision=review").text


def test_what_cannot_be_had_is_said_in_sentences_without_options_of_the_command_line(served: Served) -> None:
    put_rows(served.config, ["new"], run="run-9", uri=["mem://new.jpg"], embed_run_id=[None], embed_fingerprint=[None])
    served.desk.shelf.refresh()
    browser, image_id = served.browser(), served.rows()["new.jpg"]["image_id"]
    unlike = text_of(browser.get(f"/?like={image_id}").text)
    assert f"image '{image_id}' has no embedding" in unlike
    absent = text_of(browser.get("/?like=" + "0" * 32).text)
    assert f"\nImage '{'0' * 32}' is not in {served.config.uri}" in absent
    assert "--" not in unlike + absent
    nobody = browser.judge(served.rows()["0000.jpg"], "allow").json()["error"]
    assert nobody.startswith("Nobody said who reviews. Write")


def test_a_file_is_taken_as_a_query(starter: Served) -> None:
    browser, rows = starter.browser(), by_id(starter)
    row = next(iter(rows.values()))
    answer = browser.write("/query-image?decision=allow", content=Path(row["uri"]).read_bytes())
    assert answer.status_code == 200
    location = answer.json()["location"]
    assert "decision=allow" in location
    shown = shown_ids(browser.get(location).text)
    assert shown[0] == row["image_id"]
    assert "forgotten" in browser.get("/?image=nothing").text


def test_a_text_is_looked_for(starter: Served) -> None:
    page = starter.browser().get("/?q=a+bicycle").text
    assert "The nearest of 12 images" in text_of(page)
    assert len(shown_ids(page)) == 12


def test_a_search_that_cannot_be_made_says_so_and_shows_the_list(read_only: Served) -> None:
    answer = read_only.browser().get("/?q=dog")  # no run names a profile
    assert answer.status_code in (200, 400)
    assert "profile" in text_of(answer.text)


def test_weights_that_are_absent_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFLOW_MODELS", str(tmp_path / "none"))
    config = small_catalog(tmp_path)
    runs = Catalog.open(config).runs
    runs.start("run", {"profile": "base"})
    runs.finish("run", {"profile": "base"})
    with serving(config) as served:
        page = served.browser().get("/?q=dog")
        assert page.status_code == 200
        assert "That cannot be searched" in page.text
        assert str(tmp_path / "none") in text_of(page.text)
        assert len(shown_ids(page.text)) == NUM  # the list is there all the same


@pytest.mark.parametrize(
    ("kind", "status"), [("bomb", 422), ("text", 422), ("svg", 422), ("truncated", 422), ("empty", 400)]
)
def test_query_images_that_are_none_are_refused(starter: Served, kind: str, status: int) -> None:
    data = {
        "bomb": png_bomb(),
        "text": b"not an image at all",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "truncated": _png()[:200],
        "empty": b"",
    }[kind]
    answer = starter.browser().write("/query-image", content=data)
    assert answer.status_code == status
    assert answer.json()["error"]


def _png() -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(sink, "PNG")
    return sink.getvalue()
