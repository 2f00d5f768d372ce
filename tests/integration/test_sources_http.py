"""Images at http(s) urls, against a server on this machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.site import BODY, PRIVATE_ALLOWED, Site, fetch, resolve, serving
from vlmflow.config import MIB, HttpConfig, ImageLimits, SourceConfig
from vlmflow.errors import RowErrorClass
from vlmflow.sources import downloads, open_source
from vlmflow.sources.connections import is_public


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as server:
        yield server


def test_images_of_a_manifest_are_downloaded_in_order(site: Site, tmp_path: Path) -> None:
    urls = [f"{site.url}/image/{index}" for index in range(40)] + [f"{site.url}/Grüße 100%25.jpg?a=é&b=1"]
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri\n" + "".join(f"{url}\n" for url in urls), encoding="utf-8")
    source = open_source(SourceConfig(uri=str(manifest), http=PRIVATE_ALLOWED))
    refs = pa.Table.from_batches(list(source.list()))
    assert refs["locator"].to_pylist() == urls
    assert site.requests == {}, "listing asks no http server"
    items = source.reader(ImageLimits()).read(refs)
    assert [(item.data, item.object_version) for item in items] == [(BODY, "v1")] * 41
    assert site.requests["/Gr%C3%BC%C3%9Fe%20100%25.jpg?a=%C3%A9&b=1"] == 1
    assert all("Cookie" not in headers and headers["Accept-Encoding"] == "identity" for headers in site.headers)


def test_connections_serve_one_batch_after_the_other_and_are_closed_when_idle(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = PRIVATE_ALLOWED.model_copy(update={"timeout_s": 61.0})  # of no other test
    for _ in range(3):
        assert all(item.data == BODY for item in fetch(*(f"{site.url}/image/{n}" for n in range(32)), http=http))
    assert site.num_connections <= 16, "as many as one batch has requests at a time"
    monkeypatch.setattr(downloads, "KEPT_S", 0.05)
    fetch(f"{site.url}/image", http=http)
    kept = downloads.downloads_of(http)
    ends = time.monotonic() + 10
    while kept._pool.connections and time.monotonic() < ends:
        time.sleep(0.02)
    assert kept._pool.connections == []
    assert fetch(f"{site.url}/image", http=http)[0].data == BODY


def test_connections_that_died_while_idle_cost_no_row(site: Site) -> None:
    for _ in range(2):
        items = fetch(*(f"{site.url}/once/{n}" for n in range(40)))
        assert [item.data for item in items] == [BODY] * 40


def test_a_fork_has_connections_of_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = downloads.downloads_of(PRIVATE_ALLOWED)
    assert downloads.downloads_of(PRIVATE_ALLOWED) is before
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert downloads.downloads_of(PRIVATE_ALLOWED) is not before
    assert fetch(f"{site.url}/image")[0].data == BODY


def test_the_version_is_the_etag_or_else_the_date(site: Site) -> None:
    tagged, dated, neither = fetch(f"{site.url}/image", f"{site.url}/dated", f"{site.url}/large/5")
    assert tagged.object_version == "v1"
    assert dated.object_version == "Mon, 01 Jan 2024 00:00:00 GMT"
    assert neither.object_version is None


def test_redirects_are_followed_up_to_the_limit(site: Site) -> None:
    three, four = fetch(f"{site.url}/hops/3", f"{site.url}/hops/4")
    assert three.data == BODY
    assert four.error_class == RowErrorClass.TOO_MANY_REDIRECTS


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/a.jpg", "gopher://127.0.0.1:70/"])
def test_a_redirect_to_another_scheme_is_refused(site: Site, target: str) -> None:
    (item,) = fetch(f"{site.url}/redirect/{target}")
    assert item.error_class == RowErrorClass.ADDRESS_REFUSED


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]", "169.254.169.254"],
)
def test_private_addresses_are_refused_in_every_spelling(site: Site, host: str) -> None:
    (item,) = fetch(f"http://{host}:{site.server_port}/image", http=HttpConfig(timeout_s=60))
    assert item.error_class == RowErrorClass.ADDRESS_REFUSED
    assert site.requests == {}


def test_a_name_that_resolves_to_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"images.example": ["10.0.0.7"]})
    (item,) = fetch(f"http://images.example:{site.server_port}/image", http=HttpConfig(timeout_s=60))
    assert item.error_class == RowErrorClass.ADDRESS_REFUSED


def test_a_redirect_to_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first host passes as public, so that the hop is what is tested.
    monkeypatch.setattr("vlmflow.sources.connections.is_public", lambda address: address == "127.0.0.1")
    resolve(monkeypatch, {"images.example": ["127.0.0.1"], "inside.example": ["192.168.1.1"]})
    public = f"http://images.example:{site.server_port}"
    good, loopback, inside = fetch(
        f"{public}/redirect/{public}/image",
        f"{public}/redirect/http://127.0.0.2:{site.server_port}/image",
        f"{public}/redirect/http://inside.example/image",
        http=HttpConfig(timeout_s=60),
    )
    assert good.data == BODY
    assert {loopback.error_class, inside.error_class} == {RowErrorClass.ADDRESS_REFUSED}


def test_a_name_that_resolves_elsewhere_the_second_time_gains_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str] = []
    monkeypatch.setattr("vlmflow.sources.connections.is_public", lambda address: address == "127.0.0.1")
    lookups = resolve(monkeypatch, {"images.example": ["127.0.0.1"]}, then={"images.example": ["127.0.0.3"]})
    connect = socket.socket.connect

    def recording_connect(self: socket.socket, address: Any) -> None:
        connected.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recording_connect)
    fetch(f"http://images.example:{site.server_port}/image", http=HttpConfig(timeout_s=60))
    assert lookups == ["images.example"], "resolved once, and connected to what was checked"
    assert set(connected) <= {"127.0.0.1"}


def test_only_the_public_internet_is_public() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "2002:808:808::1", "64:ff9b::808:808"):
        assert is_public(address), address
    inside = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    inside += ["224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.1", "198.18.0.1", "192.0.2.1"]
    inside += ["::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "2002:a00:1::1", "64:ff9b::a00:1"]
    inside += ["fec0::1", "::127.0.0.1", "::10.0.0.1", "168.63.129.16", "::ffff:168.63.129.16"]
    inside += ["2001:db8::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"]
    for address in inside:
        assert not is_public(address), address


def test_a_body_that_is_too_large_is_not_read_to_its_end(site: Site) -> None:
    announced, endless = fetch(f"{site.url}/large/{2 * MIB}", f"{site.url}/endless")
    for item in (announced, endless):
        assert (item.error_class, item.data) == (RowErrorClass.TOO_MANY_BYTES, None)
    (exact,) = fetch(f"{site.url}/large/{MIB}")
    assert exact.data == bytes(MIB)


@pytest.mark.parametrize("what", ["body", "headers"])
def test_a_server_that_dribbles_is_given_up_in_time(site: Site, what: str) -> None:
    started = time.monotonic()
    (item,) = fetch(f"{site.url}/slow/{what}", http=PRIVATE_ALLOWED.model_copy(update={"timeout_s": 0.5}))
    assert item.error_class == RowErrorClass.READ_TIMEOUT
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("status", "error_class", "attempts"),
    [
        (404, RowErrorClass.MISSING, 1),
        (410, RowErrorClass.MISSING, 1),
        (401, RowErrorClass.ACCESS_DENIED, 1),
        (403, RowErrorClass.ACCESS_DENIED, 1),
        (418, RowErrorClass.HTTP_STATUS, 1),
        (204, RowErrorClass.HTTP_STATUS, 1),
        (429, RowErrorClass.HTTP_STATUS, 3),
        (500, RowErrorClass.HTTP_STATUS, 3),
        (503, RowErrorClass.HTTP_STATUS, 3),
    ],
)
def test_a_status_has_its_class_and_its_attempts(
    site: Site, status: int, error_class: RowErrorClass, attempts: int
) -> None:
    (item,) = fetch(f"{site.url}/status/{status}?X-Amz-Signature=5ec7e7")
    assert (item.error_class, item.message) == (error_class, f"HTTP {status}")
    assert sum(site.requests.values()) == attempts


def test_a_server_that_recovers_is_read(site: Site) -> None:
    (item,) = fetch(f"{site.url}/flaky")
    assert item.data == BODY
    assert sum(site.requests.values()) == 3


def test_a_body_that_breaks_off_is_no_image(site: Site) -> None:
    (item,) = fetch(f"{site.url}/short")
    assert (item.error_class, item.data) == (RowErrorClass.READ_FAILED, None)
    assert sum(site.requests.values()) == 3


def test_what_cannot_be_fetched_costs_its_row_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {})
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody else's port, and nobody listens
        urls = {
            f"{site.url}/image": None,
            "http://no-such-host.example/a.jpg": RowErrorClass.READ_FAILED,
            f"http://127.0.0.1:{deaf.getsockname()[1]}/a.jpg": RowErrorClass.READ_FAILED,
            "http:///a.jpg": RowErrorClass.READ_FAILED,
            "http://[::1/a.jpg": RowErrorClass.READ_FAILED,
            "http://host:port/a.jpg": RowErrorClass.READ_FAILED,
            f"http://{'x' * 70}.example/a.jpg": RowErrorClass.READ_FAILED,
            f"{site.url}/zipped": RowErrorClass.READ_FAILED,
        }
        items = fetch(*urls)
    assert [item.error_class for item in items] == list(urls.values())
    assert items[1].message == "the host cannot be resolved"
