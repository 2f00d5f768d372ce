"""The report in a real browser: of the demo, of hostile texts, of many rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.browser import Browser, open_browser
from tests.hostile import HOSTILE
from tests.report_samples import label, labels_of, put_pictures, put_record, put_rows
from vlmflow import write_report
from vlmflow.catalog import Catalog
from vlmflow.cli import main
from vlmflow.config import CatalogConfig
from vlmflow.demo import run_demo
from vlmflow.engine.progress import SilentProgress
from vlmflow.errors import CatalogError, ConfigError
from vlmflow.views_search import printable

MAX_BYTES = 15_000_000
_NUM_DEMO = 213
_REVEAL = "#new button.reveal"
_COLOURS = """
const image = document.querySelector(arguments[0]);
const canvas = document.createElement('canvas');
canvas.width = canvas.height = 32;
const context = canvas.getContext('2d');
context.drawImage(image, 0, 0, 32, 32);
return new Set(new Uint32Array(context.getImageData(0, 0, 32, 32).data.buffer)).size;
"""


@pytest.fixture(scope="module")
def demo(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the demo ends with."""
    root = tmp_path_factory.mktemp("report")
    with (root / "log").open("w", encoding="utf-8") as log:
        run_demo(str(root / "catalog"), SilentProgress(), Console(file=log, width=500))
    page = root / "catalog" / "report.html"
    assert f"\n  {page}\n" in (root / "log").read_text(encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


def visible(browser: Browser) -> list[str]:
    """The last part of the address of each row that is shown, in order."""
    rows = browser.run(
        "return [...document.querySelectorAll('#table tbody tr')].filter((row) => row.checkVisibility())"
        ".map((row) => row.cells[0].textContent)"
    )
    return [row.rsplit("/", 1)[-1] for row in rows]


def cells(browser: Browser, column: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#table tbody tr')].filter((row) => row.checkVisibility())"
        ".map((row) => row.cells[arguments[0]].textContent)"
    )
    found: list[str] = browser.run(script, column)
    return found


def click(browser: Browser, selector: str) -> None:
    browser.run("document.querySelector(arguments[0]).click()", selector)


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
        "box.dispatchEvent(new Event(box.tagName === 'INPUT' ? 'input' : 'change', {bubbles: true}));",
        name,
        value,
    )


def assert_quiet(browser: Browser) -> None:
    """Nothing was logged, an error of the policy included, and nothing asked for."""
    assert browser.console() == []
    assert browser.requests() == []


def test_the_page_of_the_demo_shows_all_its_parts(demo: Path, window: Browser) -> None:
    window.open(demo)
    assert_quiet(window)
    heads = window.run("return [...document.querySelectorAll('h2')].map((head) => head.textContent)")
    assert heads == [
        "The run", "The catalog", "Scores and decisions", "Newly flagged", "Lowest match scores", "Examples per label",
        "Duplicates", "Rows",
    ]  # fmt: skip
    text = window.run("return document.body.innerText")
    assert "What limited it." in text
    assert "All 54 are shown." in text
    assert "4 of 209 images repeat another one" in text
    for name in ("truncated", "empty_file", "not_an_image", "unsupported_format"):
        assert name in text
    broken = window.run("return [...document.images].filter((image) => !image.complete || !image.naturalWidth).length")
    assert broken == 0
    assert window.run("return document.querySelectorAll('#new .card').length") == 54
    assert demo.stat().st_size < MAX_BYTES


def test_rows_are_filtered(demo: Path, window: Browser) -> None:
    window.open(demo)
    assert len(visible(window)) == _NUM_DEMO
    choose(window, "f-decision", "block")
    assert len(visible(window)) == 28
    assert window.run("return document.getElementById('shown').textContent") == f"28 of {_NUM_DEMO} rows shown"
    choose(window, "f-text", "Slot Machine")
    assert 0 < len(visible(window)) < 28
    click(window, "#f-clear")
    assert len(visible(window)) == _NUM_DEMO
    choose(window, "f-status", "unreadable")
    assert len(visible(window)) == 4
    click(window, "#f-clear")
    choose(window, "f-sets", "duplicate")
    assert len(visible(window)) == 8
    assert_quiet(window)


def test_rows_are_sorted_both_ways_and_what_has_no_value_comes_last(demo: Path, window: Browser) -> None:
    window.open(demo)
    head = "#table th:nth-child(5) button"
    for wanted, way in (("ascending", 1), ("descending", -1)):
        click(window, head)
        shown = cells(window, 4)
        scores = [float(value) for value in shown if value != "–"]
        assert scores == sorted(scores, key=lambda score: way * score)
        assert shown[len(scores) :] == ["–"] * 4
        assert window.run("return document.querySelector('#table th[aria-sort]').ariaSort") == wanted
    click(window, "#table th:nth-child(8) button")
    captions = [value.lower() for value in cells(window, 7) if value != "–"]
    assert captions == sorted(captions)
    assert_quiet(window)


def test_a_flagged_image_is_blurred_in_its_pixels_until_clicked(demo: Path, window: Browser) -> None:
    window.open(demo)
    image = f"{_REVEAL} img"
    blurred = window.run("return document.querySelector(arguments[0]).src", image)
    assert window.run("return document.querySelector(arguments[0]).naturalWidth", image) == 48
    click(window, _REVEAL)
    assert window.run("return document.querySelector(arguments[0]).src", image) != blurred
    window.run("return document.querySelector(arguments[0]).decode()", image)
    assert window.run("return document.querySelector(arguments[0]).naturalWidth", image) == 192
    assert window.run("return document.querySelector(arguments[0]).ariaPressed", _REVEAL) == "true"
    click(window, _REVEAL)
    assert window.run("return document.querySelector(arguments[0]).src", image) == blurred
    # No flagged image is shown clear anywhere.
    assert window.run("return document.querySelectorAll('.review .pic > img, .block .pic > img').length") == 0
    flagged = "#table tr:is([data-decision=review], [data-decision=block]) td > img"
    assert window.run("return document.querySelectorAll(arguments[0]).length", flagged) == 0
    assert_quiet(window)


def test_the_keyboard_reaches_and_works_everything(demo: Path, window: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    window.open(demo)
    ActionChains(window.chrome).send_keys(Keys.TAB).perform()
    assert window.run("return document.activeElement.textContent") == "Skip to the report"
    ActionChains(window.chrome).send_keys(Keys.ENTER).perform()
    assert window.run("return document.activeElement.id") == "main"
    window.run("document.querySelector(arguments[0]).focus()", _REVEAL)
    ActionChains(window.chrome).send_keys(Keys.SPACE).perform()
    assert window.run("return document.activeElement.ariaPressed") == "true"
    ActionChains(window.chrome).send_keys(Keys.TAB).perform()
    assert window.run("return document.activeElement.matches('button.reveal')")
    outline = window.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (1280, False),
        (320, True),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1280, True), (390, False))),
    ],
)
def test_the_page_is_accessible_in_light_and_dark_and_on_a_phone(demo: Path, width: int, dark: bool) -> None:
    with open_browser(width=width, dark=dark) as browser:
        browser.open(demo)
        assert_quiet(browser)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        dim = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert dim == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
        assert browser.violations() == []


def hostile_catalog(root: Path) -> CatalogConfig:
    """Every field of a row, a policy and a record of a run holds a hostile text."""
    folder = root / '"><img src=x onerror=alert(1)>'
    config = CatalogConfig(uri=str(folder))
    texts = [text for name, text in HOSTILE.items() if name != "surrogate"]  # no valid UTF-8: no table holds it
    names = [f"h{number}" for number in range(len(texts))]
    put_rows(
        config,
        names,
        uri=texts,
        key=texts,
        caption=texts,
        title=texts,
        format=texts,
        decision=["allow", *texts[1:]],
        status=texts,
        decision_reason=texts,
        content_hash=["the same"] * len(texts),
        errors=[[{"stage": text, "class": text, "message": text}] for text in texts],
        labels=labels_of([[label(text, 0.7, text, text)] for text in texts]),
        policy_name=texts,
        policy_version=texts,
    )
    counts = dict.fromkeys(texts, 1)
    stages = [{"stage": text, "images": 1, "busy_s": 1.0, "images_per_busy_s": 1.0} for text in texts]
    put_record(
        config, "run-1", message="".join(texts[:3]), source=texts[0], profile=texts[1], policy=texts[2],
        statuses=counts, decisions=counts, errors=counts, models=dict(zip(texts, texts, strict=True)), stages=stages,
        versions=dict(zip(texts, texts, strict=True)), due=dict.fromkeys(texts, counts),
        pools=[{"tasks": texts, "batches": 1, "busy_s": 2.0, "waiting_s": 1.0}],
    )  # fmt: skip
    other: dict[str, Any] = {text: text for text in texts}
    Catalog.open(config).runs.start("run-2", other | {"flips": counts, "operation": texts[0]})
    return config


@pytest.mark.parametrize("run", ["run-1", "run-2"])
def test_hostile_texts_are_shown_as_text_and_nothing_runs(tmp_path: Path, window: Browser, run: str) -> None:
    config = hostile_catalog(tmp_path)
    page = tmp_path / "report.html"
    write_report(config, page, run=run)
    window.open(page)
    assert_quiet(window)  # an inline script would be an error of the page's policy
    assert window.run("return document.scripts.length") == 2
    assert window.run("return document.images.length") == 0
    assert window.run("return document.querySelectorAll('iframe, object, embed, link, base, form').length") == 0
    handlers = "return [...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])"
    assert window.run(f"{handlers}.filter((item) => /^on|^style$|^srcdoc$/i.test(item.name)).map(String)") == []
    links = window.run("return [...document.links].map((link) => link.protocol)")
    assert set(links) == {"file:"}  # our own, within the page
    shown = window.run("return document.body.textContent")
    for name, text in HOSTILE.items():
        if name != "surrogate":
            assert printable(text, 200) in shown, name
    assert "\u202e" not in shown
    window.run("for (const button of document.querySelectorAll('button, a')) button.click()")
    assert_quiet(window)
    assert window.chrome.current_url.startswith(page.as_uri())


def test_only_addresses_of_the_web_become_links(tmp_path: Path, window: Browser) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    uris = ["https://shop.invalid/a.jpg", "javascript:alert(1)", "data:text/html,x", "https://shop.invalid/flagged.jpg"]
    put_rows(config, ["a", "b", "c", "d"], uri=uris, decision=["allow", "allow", "allow", "block"])
    page = tmp_path / "report.html"
    write_report(config, page)
    window.open(page)
    found = window.run("return [...document.querySelectorAll('main a')].map((link) => [link.href, link.rel])")
    assert found
    assert {tuple(link) for link in found} == {(uris[0], "noopener noreferrer")}
    assert_quiet(window)


@pytest.mark.slow
def test_a_hundred_thousand_rows_make_a_page_under_fifteen_megabytes(tmp_path: Path, window: Browser) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    uris, hashes = put_pictures(tmp_path / "images", 400)
    random = np.random.default_rng(0)
    long = '<"\u202e&' * 100  # the texts that grow most when they are escaped
    count = 10_000
    for start in range(0, 100_000, count):
        names = [f"n{number}" for number in range(start, start + count)]
        scores = random.random((count, 5)).round(4).tolist()
        put_rows(
            config,
            names,
            uri=[uris[number % 400] for number in range(count)],
            content_hash=[hashes[number % 400] for number in range(count)],
            title=[long] * count,
            caption=[long] * count,
            decision=["allow", "review", "block", "review"] * (count // 4),
            decision_reason=[long] * count,
            labels=labels_of(
                [[label(f"{long} {place}", score, "review") for place, score in enumerate(row)] for row in scores]
            ),
            text_itm=random.random(count),
            width=[192] * count,
            height=[192] * count,
        )
    page = tmp_path / "report.html"
    written = write_report(config, page)
    assert written.num_images == 100_000
    assert written.size_bytes == page.stat().st_size < MAX_BYTES
    assert written.num_pictures > 200
    window.open(page)
    text = window.run("return document.body.innerText")
    assert "of 100,000 rows: a uniform sample of 1,000" in text
    assert len(visible(window)) == written.num_rows > 500
    assert window.run(_COLOURS, ".card.allow img") > 100  # a picture, not a patch
    assert_quiet(window)


def test_an_empty_catalog_has_a_page(tmp_path: Path, window: Browser) -> None:
    import pyarrow as pa

    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    Catalog.open_or_create(config, pa.schema([]))
    page = tmp_path / "report.html"
    written = write_report(config, page)
    assert (written.num_images, written.run_id) == (0, None)
    window.open(page)
    assert_quiet(window)
    assert window.violations() == []


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    with pytest.raises(CatalogError, match="no catalog"):
        write_report(config, tmp_path / "report.html")
    put_rows(config, ["a"])
    for place in (tmp_path, tmp_path / "absent" / "report.html"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_report(config, place)
    for arguments, code in (
        (["report", config.uri, "-o", str(tmp_path / "page.html")], 0),
        (["report", config.uri, "-o", str(tmp_path / "page.html"), "--json"], 0),
        (["report", config.uri, "--run", "x/../y"], 2),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == code
    out, err = capsys.readouterr()
    assert "1 of 1 rows" in out
    assert '"num_images":1' in out
    assert "no such run" in err
