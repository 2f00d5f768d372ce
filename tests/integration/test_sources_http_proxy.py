"""Images at https urls, and through an HTTP proxy, against servers on this machine."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.site import BODY, Site, fetch, serving
from tests.web_proxy import certificate, proxying
from vlmflow.config import HttpConfig, SourceConfig, load_job
from vlmflow.errors import ConfigError, RowErrorClass, StoreLostError
from vlmflow.sources import connections, downloads, open_source

NAME = "images.example"  # that nobody but the proxy knows
BY_PROXY = HttpConfig(timeout_s=60, proxy_env="SHOP_PROXY")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as server:
        yield server


@pytest.fixture
def safe(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The site with TLS, by a certificate that is trusted."""
    file, context = certificate(tmp_path, NAME, "forbidden.example", "dead.example")
    site.socket = context.wrap_socket(site.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    connections._ssl_context.cache_clear()
    monkeypatch.setattr(downloads, "_kept", {})  # they trust what was trusted when they were made
    yield site
    connections._ssl_context.cache_clear()


def https(site: Site) -> str:
    return site.url.replace("http:", "https:")


def test_the_trusted_certificates_are_read_once_for_all_connections(
    safe: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    load = ssl.SSLContext.load_default_certs

    def recorded(self: ssl.SSLContext, *purpose: ssl.Purpose) -> None:
        read.append(self)
        load(self, *purpose)

    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", recorded)
    private = HttpConfig(timeout_s=60, allow_private_addresses=True)
    for _ in range(2):
        items = fetch(*(f"{https(safe)}/image/{index}" for index in range(24)), http=private)
        assert [item.data for item in items] == [BODY] * 24
    assert safe.num_connections > 2
    assert len(read) == 1


def test_a_certificate_that_is_not_trusted_is_named_and_not_tried_again(
    safe: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    (item,) = fetch(f"{https(safe)}/image", http=HttpConfig(timeout_s=60, allow_private_addresses=True))
    assert item.error_class == RowErrorClass.READ_FAILED
    assert item.message == "the server's certificate is not trusted: self-signed certificate"
    assert safe.num_connections == 1


@pytest.mark.parametrize("form", ["http://{}", "{}", "http://{}/"])
def test_images_are_downloaded_through_a_proxy(site: Site, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    with proxying(site.server_port) as proxy:
        monkeypatch.setenv("SHOP_PROXY", form.format(f"127.0.0.1:{proxy.server_port}"))
        items = fetch(f"http://{NAME}/image/1", f"http://{NAME}/redirect/%2Fimage", http=BY_PROXY)
    assert [item.data for item in items] == [BODY] * 2
    assert proxy.asked == [("GET", NAME)] * 3


def test_a_proxy_makes_tunnels_for_https_and_gets_user_and_password(
    safe: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxying(safe.server_port, "sho:p@ss/w") as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"http://sho:p%40ss%2Fw@127.0.0.1:{proxy.server_port}")
        items = fetch(f"https://{NAME}/image", f"http://{NAME}/image", http=BY_PROXY)
        assert items[0].data == BODY
        assert ("CONNECT", NAME) in proxy.asked
    assert not any("Proxy-Authorization" in headers for headers in safe.headers), "is for the proxy alone"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_a_proxy_refuses_or_cannot_reach_costs_its_rows(
    safe: Site, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with proxying(safe.server_port) as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"127.0.0.1:{proxy.server_port}")
        forbidden, dead = fetch(f"{scheme}://forbidden.example/a", f"{scheme}://dead.example/a", http=BY_PROXY)
    assert forbidden.error_class == RowErrorClass.ACCESS_DENIED
    assert dead.error_class == (RowErrorClass.READ_FAILED if scheme == "https" else RowErrorClass.HTTP_STATUS)
    assert [host for _, host in proxy.asked].count("dead.example") == 3, "tried again"
    assert "403" in forbidden.message
    assert "502" in dead.message


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.0.0.7", "169.254.169.254", "[::1]", "2130706433", "0x7f.1", "127.1", "localhost", "a.localhost."],
)
def test_a_proxy_is_not_asked_for_private_addresses(site: Site, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with proxying(site.server_port) as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"127.0.0.1:{proxy.server_port}")
        straight, moved = fetch(f"http://{host}/image", f"http://{NAME}/redirect/http%3A%2F%2F{host}%2F", http=BY_PROXY)
        (allowed,) = fetch(f"http://{host}/image", http=BY_PROXY.model_copy(update={"allow_private_addresses": True}))
    assert {straight.error_class, moved.error_class} == {RowErrorClass.ADDRESS_REFUSED}
    assert allowed.data == BODY
    assert len(proxy.asked) == 2


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_another_password_ends_the_run(
    safe: Site, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with proxying(safe.server_port, "shop:right") as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"http://shop:wrong@127.0.0.1:{proxy.server_port}")
        with pytest.raises(StoreLostError, match="SHOP_PROXY names wants another user or password") as caught:
            fetch(f"{scheme}://{NAME}/image", http=BY_PROXY)
    assert not {"wrong", "right"} & set(str(caught.value).replace(":", " ").split())


def test_a_server_that_says_what_a_proxy_would_costs_its_row_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with proxying(site.server_port, "shop:right") as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"http://shop:right@127.0.0.1:{proxy.server_port}")
        (plain,) = fetch(f"http://{NAME}/status/407", http=BY_PROXY)
        request.getfixturevalue("safe")
        (in_tunnel,) = fetch(f"https://{NAME}/status/407", http=BY_PROXY)
    for item in (plain, in_tunnel):
        assert (item.error_class, item.message) == (RowErrorClass.HTTP_STATUS, "HTTP 407")


def test_a_proxy_out_of_reach_ends_the_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying(site.server_port) as proxy:
        monkeypatch.setenv("SHOP_PROXY", f"http://u:secret@127.0.0.1:{proxy.server_port}")
    with pytest.raises(StoreLostError, match="SHOP_PROXY names is out of reach") as caught:
        fetch(f"http://{NAME}/image", http=BY_PROXY)
    assert "secret" not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("value", ["socks5://u:secret@proxy:1080", "http://", "http://u:secret@[proxy", "u:secret@p:x"])
def test_a_variable_that_names_no_proxy_is_told_before_anything_is_listed(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    source = SourceConfig(uri="nowhere.csv", http=BY_PROXY)
    monkeypatch.delenv("SHOP_PROXY", raising=False)
    with pytest.raises(ConfigError, match=r"SHOP_PROXY is not set") as unset:
        open_source(source)
    assert "source.http.proxy_env" in str(unset.value.remedy)
    monkeypatch.setenv("SHOP_PROXY", value)
    with pytest.raises(ConfigError, match="SHOP_PROXY holds no url of an http proxy") as caught:
        open_source(source)
    assert "secret" not in f"{caught.value} {caught.value.remedy}"


def test_a_proxy_in_the_place_of_its_variable_is_refused_unseen(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("source: {uri: a.csv, http: {proxy_env: 'http://u:secret@proxy:3128'}}\ncatalog: {uri: c}\n")
    with pytest.raises(ConfigError, match=r"source\.http\.proxy_env") as caught:
        load_job(file)
    assert "secret" not in str(caught.value)
