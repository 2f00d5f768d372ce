"""Asking an http server whether it still has the bytes that a row was made of, against a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from tests.site import BODY, Site, fetch, serving
from vlmflow.errors import RowErrorClass
from vlmflow.sources import Fetched

TAG, DATE = '"v1"', "Mon, 01 Jan 2024 00:00:00 GMT"
CONDITIONS = ("If-None-Match", "If-Modified-Since")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as server:
        yield server


def ask(site: Site, validator: str, *answers: tuple[int, dict[str, str]]) -> tuple[Fetched, dict[str, Any]]:
    """What comes of asking a server that answers so, and what the row knew."""
    known = {"object_version": "version", "http_validator": validator, "content_hash": "hash"}
    site.told["a"] = list(answers)
    (item,) = fetch(f"{site.url}/told/a", known=known)
    return item, known


def conditions(site: Site) -> list[dict[str, str]]:
    """Those of each request."""
    return [{name: headers[name] for name in CONDITIONS if name in headers} for headers in site.headers]


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": TAG}, TAG),
        ({"Last-Modified": DATE}, DATE),
        ({"ETag": TAG, "Last-Modified": DATE}, TAG),
        ({"ETag": 'W/"v1"', "Last-Modified": DATE}, None),
        ({"ETag": "v1"}, None),
        ({"ETag": '""'}, None),
        ({"ETag": '"v1", "v2"'}, None),
        ({"Last-Modified": "Mon, 1 Jan 2024 00:00:00 GMT"}, None),
        ({"Last-Modified": "yesterday"}, None),
        ({}, None),
    ],
)
def test_a_row_keeps_what_tells_its_bytes_from_all_others(
    site: Site, headers: dict[str, str], validator: str | None
) -> None:
    site.told["a"] = [(200, headers)]
    (item,) = fetch(f"{site.url}/told/a")
    assert (item.data, item.validator) == (BODY, validator)


def test_an_image_that_was_just_changed_may_be_changed_again_in_the_same_second(site: Site) -> None:
    site.told["a"] = [(200, {"Last-Modified": formatdate(usegmt=True)})]
    assert fetch(f"{site.url}/told/a")[0].validator is None


@pytest.mark.parametrize(
    ("validator", "name", "header"), [(TAG, "If-None-Match", "ETag"), (DATE, "If-Modified-Since", "Last-Modified")]
)
def test_what_the_server_still_has_is_not_downloaded(site: Site, validator: str, name: str, header: str) -> None:
    item, known = ask(site, validator, (503, {}), (304, {header: validator}))
    assert (item.data, item.error_class, item.object_version, item.validator) == (None, None, "version", validator)
    assert item.unmodified is not None
    assert {key: item.unmodified[key] for key in known} == known
    assert conditions(site) == [{name: validator}] * 2


@pytest.mark.parametrize("validator", [TAG, DATE])
def test_what_the_server_has_no_more_is_downloaded(site: Site, validator: str) -> None:
    item, _ = ask(site, validator, (200, {"ETag": '"v2"'}))
    assert (item.data, item.object_version, item.validator, item.unmodified) == (BODY, "v2", '"v2"', None)
    assert len(site.headers) == 1


@pytest.mark.parametrize(
    ("validator", "status", "headers"),
    [
        (TAG, 304, {}),
        (TAG, 304, {"ETag": 'W/"v1"'}),
        (TAG, 304, {"ETag": '"v2"'}),
        (TAG, 304, {"Last-Modified": DATE}),
        (TAG, 412, {"ETag": TAG}),
        (DATE, 304, {}),
        (DATE, 304, {"Last-Modified": "Sun, 01 Jan 2023 00:00:00 GMT"}),
    ],
)
def test_an_answer_that_does_not_repeat_what_was_asked_is_not_believed(
    site: Site, validator: str, status: int, headers: dict[str, str]
) -> None:
    item, _ = ask(site, validator, (status, headers), (200, {"ETag": TAG}))
    assert (item.data, item.validator, item.unmodified) == (BODY, TAG, None)
    first, second = conditions(site)
    assert first
    assert not second


def test_an_answer_that_nobody_asked_for_is_an_error_of_its_image(site: Site) -> None:
    site.told["a"] = [(304, {"ETag": TAG})]
    (unasked,) = fetch(f"{site.url}/told/a")
    asked, _ = ask(site, TAG, (304, {}))
    for item in (unasked, asked):
        assert (item.data, item.error_class, item.message) == (None, RowErrorClass.HTTP_STATUS, "HTTP 304")
        assert item.unmodified is None


def test_where_a_redirect_leads_another_image_may_have_the_same_tag(site: Site) -> None:
    (moved,) = fetch(f"{site.url}/redirect/{site.url}/image")
    assert (moved.data, moved.object_version, moved.validator) == (BODY, "v1", None)
    site.headers.clear()
    item, _ = ask(site, TAG, (302, {"Location": "/image"}))
    assert (item.data, item.validator, item.unmodified) == (BODY, None, None)
    assert conditions(site) == [{"If-None-Match": TAG}, {}]


def test_connections_serve_on_after_an_answer_without_a_body(site: Site) -> None:
    site.told["a"] = [(304, {"ETag": TAG})]
    known = {"object_version": "v1", "http_validator": TAG, "content_hash": "hash"}
    items = fetch(*[f"{site.url}/told/a"] * 150, known=known)
    assert all(item.unmodified for item in items)
    assert site.num_connections <= 32
