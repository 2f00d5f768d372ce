"""Nothing is served without the token, to another name, or to a page of another site."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.responses import PlainTextResponse

from tests.web_samples import HOST, ORIGIN, TOKEN, Served, serving, small_catalog
from vlmflow.web import guard
from vlmflow.web.sessions import Sessions

READS = (
    "/", "/?q=dog", "/?decision=block", "/image/{id}", "/review", "/review?decision=review", "/picture/{id}",
    "/picture/{id}?size=large&show=1", "/map/{id}?label=gun", "/app.js", "/app.css", "/icon.svg", "/nothing",
)  # fmt: skip
WRITES = ("/verdict", "/undo", "/reviewer", "/query-image")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(small_catalog(tmp_path_factory.mktemp("guard"))) as served:
        yield served


def known(served: Served, path: str) -> str:
    return path.format(id=next(iter(served.rows().values()))["image_id"])


@pytest.mark.parametrize("path", READS)
def test_nothing_is_read_without_the_token(served: Served, path: str) -> None:
    for cookie in (None, "wrong", '"; x=', TOKEN):
        stranger = served.stranger()
        headers = {} if cookie is None else {"Cookie": f"vlmflow={cookie}"}
        answer = stranger.get(known(served, path), headers=headers)
        assert answer.status_code == 401
        assert "vlmflow serve" in answer.text
        assert len(answer.text) < 200
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", WRITES)
def test_nothing_is_written_without_the_token(served: Served, path: str) -> None:
    answer = served.stranger().post(path, json={}, headers={"Origin": ORIGIN, "X-Vlmflow-Csrf": "x"})
    assert answer.status_code == 401


def test_the_token_lets_in_as_people_write_it_into_the_address(served: Served) -> None:
    quoted = "".join(f"%{ord(character):02X}" for character in TOKEN)
    for query in (f"token={TOKEN}", f"a=b&token={TOKEN}&c", f"token={quoted}"):
        assert served.stranger().get(f"/enter?{query}").status_code == 303, query
    for query in ("", "token", f"tokens={TOKEN}", f"token={TOKEN.replace('+', ' ')}", f"token=x&token={TOKEN}"):
        assert served.stranger().get(f"/enter?{query}").status_code == 401, query


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "\udc80", "%00"])
def test_no_other_token_lets_in(served: Served, token: str) -> None:
    raw = token.encode("utf-8", "surrogateescape")
    answer = served.stranger().get("/enter", params={"token": raw.decode("latin-1")})
    assert answer.status_code == 401
    assert served.stranger().get("/enter").status_code == 401
    assert served.stranger().post(f"/enter?token={TOKEN}", headers={"Origin": ORIGIN}).status_code == 401


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_never_see(served: Served) -> None:
    answer = served.stranger().get("/enter", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie  # a link of another page leads in; its forms and scripts write nothing
    assert TOKEN not in cookie
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8377", "127.0.0.1:80", "127.0.0.1.evil.example:8377", "localhost", ""]
)
def test_a_name_that_is_not_ours_is_refused_token_or_not(served: Served, host: str) -> None:
    browser = served.browser()
    answer = browser.get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert served.stranger().get("/enter", params={"token": TOKEN}, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("path", WRITES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://{HOST}.evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        {},
    ],
    ids=["other site", "null", "longer name", "other port", "cross-site", "no origin"],
)
def test_a_page_of_another_site_cannot_write(served: Served, path: str, headers: dict[str, str]) -> None:
    browser = served.browser()
    answer = browser.post(path, json={}, headers={"X-Vlmflow-Csrf": browser.csrf(), **headers})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", WRITES)
@pytest.mark.parametrize("secret", ["", "wrong", "é"])
def test_a_write_needs_the_secret_of_its_own_session(served: Served, path: str, secret: str) -> None:
    browser, other = served.browser(), served.browser()
    for given in (secret.encode(), other.csrf().encode()):
        answer = browser.post(path, json={}, headers={b"Origin": ORIGIN.encode(), b"X-Vlmflow-Csrf": given})
        assert answer.status_code == 403


@pytest.mark.parametrize("path", READS)
def test_browsers_are_told_to_run_and_load_nothing_but_ours(served: Served, path: str) -> None:
    answer = served.browser().get(known(served, path))
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"].split(",")[0] in ("no-store", "private")
    if answer.headers["content-type"].startswith("text/html"):
        assert "no-store" in answer.headers["cache-control"]
        for inline in ("<style", "style=", " onclick", " onload", " onerror", "javascript:"):
            assert inline not in answer.text.lower()


def test_strangers_are_told_the_same(served: Served) -> None:
    answer = served.stranger().get("/")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/image/../../etc/passwd", "/image/..%2f..%2fetc%2fpasswd", "/picture/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/picture//etc/passwd", "/..%2fapp.py", "/app.js/../app.py", "/%2e%2e/web/app.py", "/static/app.js",
        "/image/" + "a" * 31, "/picture/" + "g" * 32, "/map/" + "é" * 32, "/image/" + "A" * 32,
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_app(served: Served, path: str) -> None:
    answer = served.browser().get(path)
    assert answer.status_code == 404
    for leak in ("root:", "import ", "Traceback"):
        assert leak not in answer.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_do_nothing(served: Served, method: str) -> None:
    browser = served.browser()
    headers = {"Origin": ORIGIN, "X-Vlmflow-Csrf": browser.csrf()}
    assert browser.request(method, "/verdict", headers=headers).status_code == 405
    assert browser.request(method, "/", headers=headers).status_code == 405


def test_web_sockets_are_closed(served: Served) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), served.browser().websocket_connect("/"):
        pass


def test_the_token_stays_out_of_logs_and_pages(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    browser = served.browser()
    pages: list[Any] = [browser.get(path) for path in ("/", "/review", "/nothing")]
    pages.append(served.stranger().get("/enter", params={"token": TOKEN + "?"}))
    assert not any(TOKEN in page.text for page in pages)
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert not any(TOKEN in message for message in ours)


def test_beyond_so_many_requests_others_come_again_and_verdicts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_REQUESTS", 3)
    sessions = Sessions(TOKEN)
    session = sessions.enter(TOKEN)
    assert session is not None
    names = {"host": HOST, "origin": ORIGIN, "x-vlmflow-csrf": session.csrf, "cookie": f"vlmflow={session.key}"}
    own = [(name.encode(), value.encode()) for name, value in names.items()]

    async def asked() -> None:
        go_on = anyio.Event()

        async def inside(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                await go_on.wait()
                raise RuntimeError("it broke")
            await PlainTextResponse("")(scope, receive, send)

        app = guard.Guard(inside, sessions, frozenset({HOST}), "vlmflow")

        async def ask(path: str, method: str = "GET", headers: Any = own) -> int | None:
            statuses: list[int] = []

            async def send(message: Any) -> None:
                statuses.append(message.get("status"))

            scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
            await app(scope, anyio.sleep_forever, send)
            return statuses[0] if statuses else None

        async with anyio.create_task_group() as group:
            for expected in (200, 200, 503):
                group.start_soon(ask, "/slow")
                await anyio.wait_all_tasks_blocked()
                assert await ask("/") == expected
            assert (await ask("/verdict", "POST"), await ask("/undo", "POST")) == (200, 200)
            assert await ask("/", headers=own[:1]) == 401, "strangers take no place, and learn nothing"
            go_on.set()
        assert await ask("/") == 200

    anyio.run(asked)


@pytest.mark.parametrize("path", ["/verdict", "/query-image"])
def test_who_leaves_while_sending_is_no_failure_of_the_app(
    served: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    browser = served.browser()
    names = {"host": HOST, "origin": ORIGIN, "x-vlmflow-csrf": browser.csrf()}
    names["cookie"] = f"vlmflow={browser.cookies['vlmflow']}"
    headers = [(name.encode(), value.encode()) for name, value in names.items()]
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def leave() -> None:
        async def receive() -> Any:
            return messages.pop(0)

        async def send(_: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await served.app(scope, receive, send)

    anyio.run(leave)
    assert not messages
    assert not [record for record in caplog.records if record.name == "vlmflow"]


def test_many_sessions_do_not_pile_up() -> None:
    sessions = Sessions(TOKEN)
    opened = [sessions.enter(TOKEN) for _ in range(1_100)]
    alive = [session for session in opened if session is not None and sessions.find(session.key) is session]
    assert len(alive) == 1_000
    assert alive[-1] is opened[-1]


def test_secrets_of_sessions_differ(served: Served, tmp_path: Path) -> None:
    assert served.browser().csrf() != served.browser().csrf()


@pytest.mark.parametrize("other", ['prefs={"a": 1}', "a=x y", "=;;", 'q="'])
def test_cookies_of_other_apps_do_not_hide_ours(served: Served, other: str) -> None:
    key = served.browser().cookies["vlmflow"]
    stranger = served.stranger()
    assert stranger.get("/", headers={"Cookie": f"{other}; vlmflow={key}"}).status_code == 200
    assert stranger.get("/", headers={"Cookie": other}).status_code == 401


def test_an_origin_that_is_no_address_is_refused(served: Served) -> None:
    assert served.stranger().post("/verdict", json={}, headers={"Origin": "http://["}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_leave(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmflow.cli import main
    from vlmflow.web import server

    served: list[str] = []
    monkeypatch.setattr(server, "serve", lambda catalog, config, **_: served.append(config.host))
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "catalog", "--host", host])
    assert (stopped.value.code, served) == (0, [host])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
@pytest.mark.parametrize("port", [8377, 80])
def test_the_address_that_is_printed_leads_to_the_app(host: str, port: int) -> None:
    from urllib.parse import urlsplit

    from vlmflow.web.server import ServeConfig, _address, _hosts

    hosts = _hosts(ServeConfig(host=host, names=("proxy.example",)), port)
    printed = _address(host, port, TOKEN)
    assert urlsplit(printed.url).netloc in hosts
    assert {"proxy.example", f"proxy.example:{port}"} <= hosts
    assert ("localhost:8377" in hosts) == (port == 8377 and host not in ("192.0.2.1", "2001:db8::1"))
    assert printed.is_exposed == (host not in ("127.0.0.1", "127.0.0.2", "::1"))
