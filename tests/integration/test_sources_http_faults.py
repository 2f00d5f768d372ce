"""Servers that ask for patience, swallow packets or lead nowhere cost their own rows, and no more time than is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpcore
import pytest

from tests.site import BODY, PRIVATE_ALLOWED, Site, fetch, resolve, serving
from vlmflow.errors import RowErrorClass


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("wait", ["2", "date-3"])
def test_a_server_that_says_when_to_come_again_is_asked_then(site: Site, wait: str) -> None:
    (item,) = fetch(f"{site.url}/later/{wait}")
    assert item.data == BODY
    assert 1.9 <= site.asked[1] - site.asked[0] < 30


@pytest.mark.parametrize("wait", ["3600", "date-3600"])
def test_a_server_that_asks_for_more_time_than_there_is_fails_at_once(site: Site, wait: str) -> None:
    started = time.monotonic()
    (item,) = fetch(f"{site.url}/later/{wait}")
    assert (item.error_class, item.message) == (RowErrorClass.HTTP_STATUS, "HTTP 429")
    assert time.monotonic() - started < 30, "half of the time that there is"


def test_what_makes_no_sense_of_when_to_come_again_is_passed_over(site: Site) -> None:
    items = fetch(*(f"{site.url}/later/{wait}" for wait in ("soon", "-5", "9" * 5000, "1e3")))
    assert [item.data for item in items] == [BODY] * 4


def test_an_address_that_swallows_packets_leaves_the_others_their_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, float | None]] = []
    connect = httpcore.AnyIOBackend.connect_tcp

    async def connect_tcp(self: Any, host: str, port: int, timeout: float | None = None, *rest: Any) -> Any:
        tried.append((host, timeout))
        if host == "2001:db8::1":
            await asyncio.sleep(130 if timeout is None else timeout)
            raise httpcore.ConnectTimeout
        return await connect(self, host, port, timeout, *rest)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    resolve(monkeypatch, {"dual.example": ["2001:db8::1", "127.0.0.1"]})
    http = PRIVATE_ALLOWED.model_copy(update={"timeout_s": 2.0})
    (item,) = fetch(f"http://dual.example:{site.server_port}/image", http=http)
    assert item.data == BODY
    assert tried == [("2001:db8::1", 1.0), ("127.0.0.1", None)]


@pytest.mark.parametrize("location", ["http://[", "//[x", "http://[::1", "https://a:99999/", "http://a\x7f[/"])
def test_a_redirect_to_what_is_no_url_costs_its_row_alone(site: Site, location: str) -> None:
    bad, good = fetch(f"{site.url}/redirect/{location}", f"{site.url}/image")
    assert bad.error_class == RowErrorClass.READ_FAILED
    assert good.data == BODY
    (alone,) = fetch(f"{site.url}/redirect/{location}")
    assert alone.error_class == RowErrorClass.READ_FAILED


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("/image/Grüße.jpg".encode(), "/image/Gr%C3%BC%C3%9Fe.jpg"),
        ("/image/Grüße.jpg".encode("latin-1"), "/image/Gr%FC%DFe.jpg"),
        ("/image/Gr%C3%BC%C3%9Fe.jpg?a=é".encode(), "/image/Gr%C3%BC%C3%9Fe.jpg?a=%C3%A9"),
    ],
)
def test_a_redirect_beyond_ascii_leads_to_the_very_bytes(site: Site, location: bytes, asked: str) -> None:
    site.told["moved"] = [(302, {"Location": location.decode("latin-1")})]
    (item,) = fetch(f"{site.url}/told/moved")
    assert item.data == BODY
    assert site.requests[asked] == 1


@pytest.mark.parametrize("error", [OSError(24, "too many open files"), ValueError("embedded null byte")])
def test_a_resolver_that_fails_costs_its_rows(site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise error

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    (item,) = fetch(f"{site.url}/image")
    assert (item.error_class, item.message) == (RowErrorClass.READ_FAILED, "the host cannot be resolved")


@pytest.mark.parametrize("error", [OSError("unforeseen"), ValueError("unforeseen")])
def test_what_nobody_foresaw_of_a_download_costs_its_row(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("vlmflow.sources.http.HttpFetcher.fetch", fails)
    (item,) = fetch(f"{site.url}/image")
    assert (item.error_class, item.message) == (
        RowErrorClass.READ_FAILED,
        f"the download failed ({type(error).__name__})",
    )
