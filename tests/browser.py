"""A headless Chromium for tests of pages: what it logs, what it asks the network for, what axe-core finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

_AXE = Path(__file__).parent / "axe" / "axe.min.js"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_DRIVERS = ("chromedriver", "chromium.chromedriver")


def _program(names: tuple[str, ...]) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def open_browser(*, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Browser]:
    """Starts a browser; skips the test where none is installed."""
    program, driver = _program(_BROWSERS), _program(_DRIVERS)
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--window-size={width},{height}",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))
    try:
        chrome.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        chrome.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        yield Browser(chrome)
    finally:
        chrome.quit()


class Browser:
    """One page at a time."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def open(self, page: Path | str) -> None:
        """Opens a file, or an address."""
        self.chrome.get(page if isinstance(page, str) else page.resolve().as_uri())
        # On a busy machine the driver has been seen to return while the page was still being parsed.
        WebDriverWait(self.chrome, 60).until(lambda _: self.run("return document.readyState") == "complete")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of script returns."""
        return self.chrome.execute_script(script, *arguments)

    def console(self) -> list[str]:
        """What the page has logged, errors of its policy included."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def requests(self) -> list[str]:
        """What the page has asked for beside itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        urls = [
            entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "file:"))]

    def violations(self) -> list[str]:
        """What axe-core finds wrong, a line each."""
        self.run(_AXE.read_text(encoding="utf-8"))
        found = self.chrome.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then((found) => done(found.violations));"
        )
        return [
            f"{rule['id']}: {rule['help']}: {node['html'][:200]} {node['failureSummary'][:300]}"
            for rule in found
            for node in rule["nodes"][:3]
        ]
