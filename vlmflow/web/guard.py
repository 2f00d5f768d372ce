"""Who is let in, and what browsers are told: before any page or action of the app.

Nothing is served without a session, and a session is opened by the token alone. The name of the host that a browser
asked for must be ours, or a page elsewhere could reach the app by a name of its own that leads here (DNS rebinding).
What writes must come from our own pages, by its origin and by a secret that only they know.
"""

from __future__ import annotations

import contextlib
import hmac
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmflow.web.sessions import Session, Sessions

ENTER = "/enter"
CSRF_HEADER = "x-vlmflow-csrf"
MAX_REQUESTS = 256  # of sessions, at a time; more are told to come again
_ALWAYS = ("/verdict", "/undo")  # but these: nobody's word is turned away
# Scripts, styles and pictures of our own, nothing inline, nothing from elsewhere, and in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex",
}
_NO_TOKEN = "Open the address that `vlmflow serve` printed: it holds the token that lets you in.\n"


class Guard:
    """Middleware around the whole app; puts the session of a request into its scope.

    Args:
        hosts: names with ports that requests may be for.
        cookie: name of the cookie; browsers send cookies to all ports of a host, so it names ours.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, hosts: frozenset[str], cookie: str) -> None:
        self._app, self._sessions, self._hosts, self._cookie = app, sessions, hosts, cookie
        self._num_at_work = 0  # requests, not connections: those that ask for nothing keep nobody out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers) or self._entrance(scope)
        session = None if answer else self._session(headers)
        if answer is None and session is None:
            answer = PlainTextResponse(_NO_TOKEN, 401)
        if answer is None and session is not None and not _may_write(scope["method"], headers, session):
            answer = PlainTextResponse("This did not come from a page of this app. Reload the page.\n", 403)
        if answer is None and self._num_at_work >= MAX_REQUESTS and scope["path"] not in _ALWAYS:
            answer = PlainTextResponse("Too much is asked for at once. Reload the page.\n", 503, {"Retry-After": "2"})
        scope["session"] = session
        self._num_at_work += answer is None
        try:
            with contextlib.suppress(Exception):  # answered and logged by the app; the server would write its text down
                await (answer or self._app)(scope, receive, _with_headers(send))
        finally:
            self._num_at_work -= answer is None

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if headers.get("host", "").lower() not in self._hosts or len(headers.getlist("host")) != 1:
            return PlainTextResponse("This name does not lead to this app; see `vlmflow serve --help`.\n", 421)
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD"):
            own = origin is not None and origin.lower().partition("://")[2] == headers["host"].lower()
            if not own or headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("This came from a page of another site.\n", 403)
        return None

    def _entrance(self, scope: Scope) -> Response | None:
        """Exchanges the token for a cookie, and takes it out of the address."""
        if scope["path"] != ENTER:
            return None
        given = _token(scope["query_string"].decode("latin-1"))
        session = self._sessions.enter(given) if scope["method"] == "GET" else None
        if session is None:
            return PlainTextResponse(_NO_TOKEN, 401)
        answer = RedirectResponse("/", 303)
        # Lax: a link to the app from any other page leads in. What writes is no GET, and must come from our own pages.
        answer.set_cookie(self._cookie, session.key, path="/", httponly=True, samesite="lax")
        return answer

    def _session(self, headers: Headers) -> Session | None:
        # Other apps of this host set cookies too, in any form: one that cannot be read must not hide ours.
        held = cookie_parser(headers.get("cookie", "")).get(self._cookie)
        return None if held is None else self._sessions.find(held)


def _token(query: str) -> str:
    """The token of an address as people write it there: a plus is a plus, as in base64, and not the space of a form."""
    values = (part.removeprefix("token=") for part in query.split("&") if part.startswith("token="))
    return unquote(next(values, ""))


def _may_write(method: str, headers: Headers, session: Session) -> bool:
    if method in ("GET", "HEAD"):
        return True
    given = headers.get(CSRF_HEADER, "").encode("utf-8", "replace")
    return hmac.compare_digest(given, session.csrf.encode())


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
            message["headers"] = headers.raw
        await send(message)

    return wrapped
