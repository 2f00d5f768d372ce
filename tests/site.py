"""A web site on this machine whose paths say how it behaves, and images fetched from it."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest

from vlmflow.config import MIB, HttpConfig, ImageLimits, SourceConfig
from vlmflow.schema import PLANNED, REFERENCE
from vlmflow.sources import Fetched
from vlmflow.sources.disk import Home
from vlmflow.sources.reader import SourceReader

PRIVATE_ALLOWED = HttpConfig(timeout_s=60, max_redirects=3, allow_private_addresses=True)
BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """A site whose paths say how it behaves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1  # type: ignore[attr-defined]
        self.server.headers.append(dict(self.headers))  # type: ignore[attr-defined]
        kind, _, rest = self.path.lstrip("/").partition("/")
        getattr(self, f"serve_{kind}", self.serve_image)(rest)

    def serve_image(self, _: str) -> None:
        self.send(200, BODY, {"ETag": '"v1"'})

    def serve_kept(self, name: str) -> None:
        body = self.server.kept[name]  # type: ignore[attr-defined]
        tag = f'"{zlib.crc32(body):x}"'
        same = self.headers["If-None-Match"] == tag
        self.send(304 if same else 200, b"" if same else body, {"ETag": tag})

    def serve_told(self, name: str) -> None:
        """Gives the answers that it was told to, one after the other, and the last one ever again."""
        answers = self.server.told[name]  # type: ignore[attr-defined]
        status, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send(status, BODY if status == 200 else b"", headers)

    def serve_dated(self, _: str) -> None:
        self.send(200, BODY, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})

    def serve_status(self, status: str) -> None:
        self.send(int(status.partition("?")[0]), b"no")

    def serve_later(self, wait: str) -> None:
        """Serves the image once, and then not before the time that it says."""
        first = self.server.requests[self.path] == 1  # type: ignore[attr-defined]
        now = time.time() if first else 0.0
        self.server.asked.append(time.monotonic())  # type: ignore[attr-defined]
        after = formatdate(now + int(wait.removeprefix("date-")), usegmt=True) if "date" in wait else wait
        self.send(429 if first else 200, b"busy" if first else BODY, {"Retry-After": after})

    def serve_flaky(self, _: str) -> None:
        failing = self.server.requests[self.path] < 3  # type: ignore[attr-defined]
        self.send(503 if failing else 200, b"busy" if failing else BODY)

    def serve_redirect(self, target: str) -> None:
        self.send(302, b"", {"Location": unquote(target)})

    def serve_hops(self, left: str) -> None:
        if int(left) == 0:
            self.serve_image("")
        else:
            self.send(301, b"", {"Location": f"{int(left) - 1}"})

    def serve_large(self, size: str) -> None:
        self.send(200, bytes(int(size)))

    def serve_endless(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def serve_slow(self, what: str) -> None:
        """Sends a byte now and then: no single read ever takes long."""
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            if what == "body":
                self.wfile.write(b"Content-Length: 1000000\r\n\r\n")
            while not self.server.stopping.wait(0.02):  # type: ignore[attr-defined]
                self.wfile.write(b"x" if what == "body" else b"X-More: 1\r\n")
                self.wfile.flush()
        self.close_connection = True

    def serve_short(self, _: str) -> None:
        self.send(200, BODY[:100], {}, announced=len(BODY))
        self.close_connection = True

    def serve_once(self, _: str) -> None:
        """One answer on each connection; then it is dead, and does not say so before it is asked again."""
        if getattr(self, "has_served", False):
            self.close_connection = True
            return
        self.has_served = True
        self.send(200, BODY)

    def serve_zipped(self, _: str) -> None:
        self.send(200, b"\x1f\x8b", {"Content-Encoding": "gzip"})

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, announced: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Site(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of those that connect at once; what more come wait a second or longer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.asked: list[float] = []
        self.num_connections = 0
        self.kept: dict[str, bytes] = {}  # what is served under kept/, and may become something else
        self.told: dict[str, list[tuple[int, dict[str, str]]]] = {}  # statuses and headers of answers under told/
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        self.num_connections += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """Serves the site until the end of the block."""
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def fetch(
    *urls: str, http: HttpConfig = PRIVATE_ALLOWED, max_bytes: int = MIB, known: dict[str, Any] | None = None
) -> list[Fetched]:
    """Reads urls as a source does, those of this machine too. ``known``: what was read before, of every url."""
    rows = [{"image_id": url, "uri": url, "locator": url, "previous_read": known} for url in urls]
    refs = pa.Table.from_pylist(rows, schema=REFERENCE.append(PLANNED.field("previous_read")))
    reader = SourceReader(SourceConfig(uri="list.csv", http=http), ImageLimits(max_bytes=max_bytes), Home("."))
    return reader.read(refs)


def resolve(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]], then: dict[str, list[str]] | None = None
) -> list[str]:
    """Lets names resolve to addresses, those of ``then`` from the second look-up on; records the look-ups."""
    lookups: list[str] = []
    real: Callable[..., Any] = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def fake(self: asyncio.AbstractEventLoop, host: str, port: int, **options: Any) -> list[Any]:
        if host[:1].isdigit() or ":" in host:
            return list(await real(self, host, port, **options))
        known = then if then is not None and host in lookups else names
        lookups.append(host)
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", fake)
    return lookups
