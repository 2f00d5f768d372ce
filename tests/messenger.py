"""A server on this machine that takes the place of a messenger such as Slack."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Messenger(http.server.ThreadingHTTPServer):
    """Keeps what it is sent; answers with ``status`` and, if there is one, a ``location``, once it ``may_answer``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.location = 200, ""
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.received: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Messenger)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server.received.append({"path": self.path, **json.loads(body or "{}")})
        server.may_answer.wait()
        self.send_response(server.status)
        if server.location:
            self.send_header("Location", server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815 - as a redirected message comes

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def running_messenger() -> Iterator[Messenger]:
    with Messenger() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
