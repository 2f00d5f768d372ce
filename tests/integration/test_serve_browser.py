"""The app in a real browser: search, filter, open, decide, undo, reload; by keyboard; what axe-core finds."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.answering import answering
from tests.browser import Browser, open_browser
from tests.hostile import HOSTILE
from tests.processes import ROOT, started, wait_for
from tests.report_samples import label, labels_of, put_rows
from tests.web_samples import starter_catalog
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig

TOKEN = "a-token-for-the-browser-tests"


@dataclass(frozen=True)
class Running:
    """A server as a process, as a user starts it; what it says is in ``log``."""

    config: CatalogConfig
    process: subprocess.Popen[bytes]
    log: Path
    base: str

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["image_id"]: row for row in Catalog.open(self.config).images().to_pylist()}


@contextmanager
def running_over(config: CatalogConfig, log: Path, *command: str) -> Iterator[Running]:
    """The app over a catalog, by the command or by another way to start it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLMFLOW_SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", *(command or ("vlmflow", "serve")), config.uri, "--port", "0"]
    with started(start, log, environment=environment) as process:
        told = re.compile(r"(http://127\.0\.0\.1:\d+)/enter\?token=\$VLMFLOW_SERVE_TOKEN")
        wait_for(lambda: told.search(log.read_text()) is not None, process)
        found = told.search(log.read_text())
        assert found is not None
        yield Running(config, process, log, found[1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("serve")
    with running_over(starter_catalog(root), root / "log", "tests.quick_serve") as running:
        yield running


@pytest.fixture(scope="module")
def window(running: Running) -> Iterator[Browser]:
    with open_browser() as browser:
        enter(browser, running)
        yield browser


def enter(browser: Browser, running: Running) -> None:
    browser.open(f"{running.base}/enter?token={TOKEN}")
    assert browser.chrome.current_url == f"{running.base}/"


def until(browser: Browser, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser.chrome, 60).until(lambda _: condition())


def shown(browser: Browser, selector: str) -> str:
    found: str = browser.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    return found.strip()


def image_id(browser: Browser) -> str:
    found: str = browser.run("return document.querySelector('#verdict')?.dataset.image ?? ''")
    return found


def review_as(browser: Browser, name: str) -> None:
    box = browser.chrome.find_element("id", "reviewer-name")
    box.clear()
    box.send_keys(name, Keys.ENTER)
    until(browser, lambda: shown(browser, "#told") == f"You review as {name}.")


def press(browser: Browser, *keys: str) -> None:
    ActionChains(browser.chrome).send_keys(*keys).perform()


@contextmanager
def page_elsewhere(body: str) -> Iterator[str]:
    """A page of another site, and its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

    with answering(Page) as port:
        yield f"http://localhost:{port}/"  # another name: 127.0.0.1 would be the same site


def assert_quiet(browser: Browser, running: Running) -> None:
    """Nothing was logged, an error of the policy included, and nothing was asked of anybody else."""
    assert browser.console() == []
    assert all(url.startswith(running.base) for url in browser.requests())


def test_a_link_of_another_page_leads_in(running: Running) -> None:
    with (
        open_browser() as browser,
        page_elsewhere(f'<a id="enter" href="{running.base}/enter?token={TOKEN}">app</a>'
                       f'<a id="image" href="{running.base}/?decision=review">app</a>') as elsewhere,
    ):  # fmt: skip
        for link, place in (("enter", "/"), ("image", "/?decision=review")):
            browser.open(elsewhere)
            browser.chrome.find_element("id", link).click()
            until(browser, lambda place=place: browser.chrome.current_url == f"{running.base}{place}")
            assert "images" in shown(browser, "#rows-h")
        browser.chrome.refresh()
        assert "images" in shown(browser, "#rows-h")


def test_connections_that_ask_for_nothing_keep_nobody_out(running: Running) -> None:
    port = int(running.base.rpartition(":")[2])
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        asking = HTTPConnection("127.0.0.1", port, timeout=60)
        asking.request("GET", f"/enter?token={TOKEN}")
        assert asking.getresponse().status == 303
        asking.close()


def test_search_filter_open_decide_undo_and_reload(running: Running, window: Browser) -> None:
    window.open(f"{running.base}/")
    window.chrome.find_element("id", "q").send_keys("a drum", Keys.ENTER)
    until(window, lambda: "The nearest of 12 images" in shown(window, "#rows-h"))
    window.run("document.querySelector('.facets a[href*=\"decision=review\"]').click()")
    until(window, lambda: "The nearest of 6 images" in shown(window, "#rows-h"))
    window.run("document.querySelector('.card .uri a').click()")
    until(window, lambda: image_id(window))
    chosen = image_id(window)
    assert running.rows()[chosen]["decision"] == "review"
    window.chrome.find_element("id", "reviewer-name").send_keys("ada")
    window.chrome.find_element("id", "reason").send_keys("looked at it")
    window.chrome.find_element("css selector", "[data-decision=block]").click()
    until(window, lambda: "Verdict block by ada" in shown(window, "main"))
    until(window, lambda: shown(window, "#told").startswith("Blocked:"))
    wait_for(lambda: running.rows()[chosen]["decision"] == "block", running.process, seconds=90)
    verdict = running.rows()[chosen]["verdict"]
    assert (verdict["reviewer"], verdict["reason"], verdict["model_decision"]) == ("ada", "looked at it", "review")
    window.chrome.refresh()
    assert "Verdict block by ada" in shown(window, "main")
    window.chrome.find_element("id", "undo").click()
    until(window, lambda: "Verdict block" not in shown(window, "main"))
    wait_for(lambda: running.rows()[chosen]["verdict"] is None, running.process, seconds=90)
    assert running.rows()[chosen]["decision"] == "review"
    window.chrome.refresh()
    assert shown(window, ".tag") == "review"
    assert_quiet(window, running)


def test_the_queue_is_worked_by_keys_alone(running: Running, window: Browser) -> None:
    window.open(f"{running.base}/review?decision=review")
    review_as(window, "ada")
    window.open(f"{running.base}/review?decision=review")
    first = image_id(window)
    assert shown(window, "h1") == "Review: 6 to decide"
    press(window, Keys.TAB, Keys.ENTER)  # skip to the content
    assert window.run("return document.activeElement.id") == "main"
    press(window, "1")
    assert shown(window, "[data-label]").startswith("gun: yes")
    assert shown(window, "#told") == "gun: yes"
    press(window, "s")
    assert window.run("return document.querySelector('.reveal').ariaPressed") == "true"
    press(window, "n")
    until(window, lambda: image_id(window) not in ("", first))
    second = image_id(window)
    press(window, "p")
    until(window, lambda: image_id(window) == first)
    press(window, "a")
    until(window, lambda: image_id(window) == second)
    until(window, lambda: shown(window, "#told").startswith("Allowed:"))
    assert shown(window, "h1") == "Review: 5 to decide"
    press(window, "u")
    until(window, lambda: image_id(window) == first)
    until(window, lambda: shown(window, "h1") == "Review: 6 to decide")
    box = window.chrome.find_element("id", "reason")
    box.send_keys("abba")  # letters that are typed decide nothing
    assert image_id(window) == first
    window.chrome.find_element("id", "keys").click()
    window.run("document.querySelector('main').focus()")
    press(window, "b")  # nor do keys that were turned off
    window.chrome.find_element("id", "keys").click()
    assert image_id(window) == first
    assert shown(window, "h1") == "Review: 6 to decide"
    assert_quiet(window, running)


def test_a_label_that_nobody_pressed_is_not_said(running: Running, window: Browser) -> None:
    one, path = next((key, f"/image/{key}") for key, row in running.rows().items() if row["decision"] == "allow")

    def said(browser: Browser) -> str:
        found: str = browser.run("return document.querySelector('[data-label=gun]').dataset.said")
        return found

    def events() -> list[tuple[str | None, ...]]:
        rows = Catalog.open(running.config).reviews.events().to_pylist()
        return [(row["reviewer"], row["decision"], row["label"]) for row in rows if row["image_id"] == one]

    with open_browser() as other:
        enter(other, running)
        other.open(f"{running.base}{path}")
        name = other.chrome.find_element("id", "reviewer-name")
        name.send_keys("eve")
        other.run("document.querySelector('[data-label=gun]').click()")
        other.chrome.find_element("id", "labels-only").click()
        until(other, lambda: shown(other, "#told").startswith("Labels noted:"))
        assert events() == [("eve", None, "gun")]
        other.chrome.delete_all_cookies()  # the next day: another session, in which the browser knows her name
        enter(other, running)
        other.open(f"{running.base}{path}")
        until(other, lambda: shown(other, "#told") == "You review as eve.")
        assert said(other) == "yes"
        name = other.chrome.find_element("id", "reviewer-name")
        name.clear()
        name.send_keys("bob")  # takes over from her
        other.chrome.find_element("css selector", "[data-decision=review]").click()
        until(other, lambda: "Verdict review by bob" in shown(other, "main"))
        assert said(other) == ""
        assert events() == [("eve", None, "gun"), ("bob", "review", None)]
        other.run("document.querySelector('#undo').click()")
        until(other, lambda: shown(other, "#told").startswith("Undone:"))
        assert_quiet(other, running)


def test_two_people_at_once(running: Running, window: Browser) -> None:
    window.open(f"{running.base}/review?decision=review")
    mine = image_id(window)
    review_as(window, "ada")
    window.run("document.querySelector('main').focus()")
    with open_browser() as other:
        enter(other, running)
        other.open(f"{running.base}/review?decision=review")
        assert image_id(other) != mine
        other.open(f"{running.base}/image/{mine}")
        other.chrome.find_element("id", "reviewer-name").send_keys("bob")
        other.chrome.find_element("css selector", "[data-decision=allow]").click()
        until(other, lambda: "Verdict allow by bob" in shown(other, "main"))
        assert_quiet(other, running)
    press(window, "b")
    until(window, lambda: window.run("return document.activeElement.id") == "keep-theirs")
    assert "bob decided allow" in shown(window, "#meanwhile-text")
    assert window.violations() == []
    press(window, Keys.ENTER)
    until(window, lambda: shown(window, "#told") == "Left as it was decided.")
    assert image_id(window) != mine
    wait_for(lambda: running.rows()[mine]["decision"] == "allow", running.process, seconds=90)
    errors = window.console()
    assert len(errors) == 1
    assert "/verdict" in errors[0]
    assert "409" in errors[0]


def test_a_map_is_drawn_or_it_says_why_not(running: Running, window: Browser) -> None:
    window.open(f"{running.base}/image/{next(iter(running.rows()))}")
    window.run("document.querySelector('[data-map]').click()")
    until(window, lambda: shown(window, "#trouble"))
    assert window.run("return document.querySelector('#map').hidden")
    window.console()  # the refusal


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_pages_are_accessible_in_light_and_dark_and_on_a_phone(running: Running, width: int, dark: bool) -> None:
    one = next(iter(running.rows()))
    with open_browser(width=width, dark=dark) as browser:
        enter(browser, running)
        for path in ("/", "/?decision=review&find=sku", f"/image/{one}", "/review", "/review?decision=block"):
            browser.open(f"{running.base}{path}")
            assert browser.violations() == [], path
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), path
            assert browser.run("return [...document.images].every((image) => image.alt !== null)")
            assert_quiet(browser, running)
        browser.open(f"{running.base}/nothing")
        assert browser.violations() == []


def test_hostile_texts_run_nothing(tmp_path: Path) -> None:
    texts = [text for name, text in HOSTILE.items() if name != "surrogate"]
    config = CatalogConfig(uri=str(tmp_path / '"><img src=x onerror=alert(1)>'))
    put_rows(
        config, [f"h{number}" for number in range(len(texts))], uri=texts, key=texts, caption=texts, title=texts,
        status=texts, decision=["allow", *texts[1:]], decision_reason=texts, policy_name=texts,
        errors=[[{"stage": text, "class": text, "message": text}] for text in texts],
        labels=labels_of([[label(text, 0.7, text, text)] for text in texts]),
    )  # fmt: skip
    with running_over(config, tmp_path / "log") as running, open_browser() as browser:
        enter(browser, running)
        paths = ["/", "/review", *(f"/image/{one}" for one in running.rows())]
        for path in paths:
            browser.open(f"{running.base}{path}")
            assert browser.run("return document.scripts.length") == 1
            assert browser.run("return document.querySelectorAll('iframe, object, embed, base').length") == 0
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), path
            browser.run("for (const one of document.querySelectorAll('[data-label], .reveal')) one.click()")
            assert browser.chrome.current_url == f"{running.base}{path}"
            assert_quiet(browser, running)


def test_ctrl_c_ends_it_and_writes_what_waits(tmp_path: Path) -> None:
    import httpx

    with running_over(starter_catalog(tmp_path), tmp_path / "log") as running:
        with httpx.Client(base_url=running.base, headers={"Origin": running.base}) as client:
            client.get("/enter", params={"token": TOKEN})
            found = re.search(r'name="csrf" content="([^"]+)"', client.get("/").text)
            assert found is not None
            client.headers["X-Vlmflow-Csrf"] = found[1]
            client.post("/reviewer", json={"name": "ada"})
            row = next(iter(running.rows().values()))
            body = {"image_id": row["image_id"], "content_hash": row["content_hash"], "decision": "block"}
            body["reviewer"] = "ada"
            assert client.post("/verdict", json=body).status_code == 200
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(300) == 0
    assert running.rows()[row["image_id"]]["decision"] == "block"
    told = running.log.read_text()
    assert "Traceback" not in told
    assert TOKEN not in told
    assert "GET" not in told  # no log of who asked for what


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (["{taken}"], {}, ["is taken", "--port"]),
        (["--host", "0.0.0.0"], {}, ["--expose"]),
        (["--host", "0.0.0.0", "--expose"], {}, ["0.0.0.0", "--name"]),
        (["--host", "nowhere"], {}, ["nowhere", "127.0.0.1"]),
        (["--host", "nowhere", "--expose"], {}, ["nowhere", "127.0.0.1"]),
        ([], {"VLMFLOW_SERVE_TOKEN": "short"}, ["5 characters", "16"]),
        ([], {"VLMFLOW_SERVE_TOKEN": "long enough&that#is%41"}, ["' ', '#', '%', '&'", "openssl"]),
        (["--profile", "huge"], {}, ["huge"]),
        (["{none}"], {}, ["no catalog"]),
    ],
    ids=["port", "exposed", "nameless", "no host", "host", "token", "marks", "profile", "no catalog"],
)
def test_what_cannot_be_served_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    named: list[str],
) -> None:
    from vlmflow.cli import main

    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place, rest = config.uri, arguments
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if arguments == ["{taken}"]:
            rest = ["--port", str(taken.getsockname()[1])]
        if arguments == ["{none}"]:
            place, rest = str(tmp_path / "none"), ["--port", "0"]
        with pytest.raises(SystemExit) as stopped:
            main(["serve", place, *rest])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("vlmflow: ")
    for word in named:
        assert word in told
