"""A proxy in front of an S3-compatible server that fails as stores do; a process of its own.

Faults that pass when they are tried again, each for a share of the requests: ``slowdown`` (503), ``internal`` (500),
``reset`` (the connection, before any answer), ``cut`` (the connection, in the middle of the body), ``stall`` (no answer
for longer than a client waits) and ``lost`` (the request is carried out, its answer is lost). And, switched on for
one bucket, those that do not: ``denied``, ``gone`` and ``readonly`` (nobody may write); and a store that makes
nothing of conditional writes, knows none, or looks whether there is a file before it takes the new one in:
``overwrites``, ``unknown`` and ``races``.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("slowdown", "internal", "reset", "cut", "stall", "lost")
STALL_S = 3.0
_ALONE_S = 2.0  # who has looked waits for another so long
_CONTROL = "/__proxy__/"
_CONDITION = "If-None-Match"
_FATAL = {
    "denied": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "readonly": (403, "AccessDenied", "Access Denied"),
    "unknown": (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
    "gone": (404, "NoSuchBucket", "The specified bucket does not exist"),
}


class FaultyProxy:
    """A running proxy, spoken to over HTTP."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"

    def faults(self) -> Counter[str]:
        """How often each fault has been injected; ``requests`` counts all requests."""
        with urllib.request.urlopen(f"{self.endpoint}{_CONTROL}faults") as answer:
            return Counter(json.load(answer))

    def fail(self, bucket: str, how: str) -> None:
        """From now on every request to the bucket fails so; ``how`` of "" ends that."""
        urllib.request.urlopen(f"{self.endpoint}{_CONTROL}fail/{bucket}/{how}").close()

    def hold(self, bucket: str, after: int) -> None:
        """Lets requests to the bucket wait, after so many, until it is told how they fail."""
        urllib.request.urlopen(f"{self.endpoint}{_CONTROL}hold/{bucket}/{after}").close()


@contextmanager
def running_proxy(upstream: str, share: float, seed: int = 0) -> Iterator[FaultyProxy]:
    """Runs a proxy in front of the endpoint ``upstream``."""
    command = [sys.executable, "-m", "tests.faulty_proxy", upstream, str(share), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert process.stdout is not None
        yield FaultyProxy(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    share: float
    random: random.Random
    counts: Counter[str] = Counter()
    failing: dict[str, str] = {}
    holding: dict[str, int] = {}  # requests that a bucket still answers
    lock = threading.Lock()
    looked = threading.Condition()
    lookers: Counter[str] = Counter()  # by path, who have found no file there

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith(_CONTROL):
            self._control()
            return
        bucket = self.path.lstrip("/").split("/")[0].split("?")[0]
        with self.lock:
            self.counts["requests"] += 1
            fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
            if bucket in self.holding:
                self.holding[bucket] -= 1
        while self.holding.get(bucket, 0) < 0:
            time.sleep(0.02)
        with self.lock:
            fatal = self.failing.get(bucket)
            if fatal or fault:
                self.counts[fatal or str(fault)] += 1
        if fatal == "races":
            self._race(body)
        elif (
            fatal == "overwrites"
            or (fatal == "unknown" and _CONDITION not in self.headers)
            or (fatal == "readonly" and self.command in ("GET", "HEAD"))
        ):
            del self.headers[_CONDITION]
            self._pass_on(body, fault)
        elif fatal:
            self._error(*_FATAL[fatal])
        elif fault == "slowdown":
            self._error(503, "SlowDown", "Please reduce your request rate.")
        elif fault == "internal":
            self._error(500, "InternalError", "We encountered an internal error. Please try again.")
        elif fault == "reset":
            self._reset()
        elif fault == "stall":
            time.sleep(STALL_S)
            self._reset()
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815  names of the library

    def _race(self, body: bytes) -> None:
        """Looks first, and writes when another has looked too."""
        if _CONDITION in self.headers:
            connection = http.client.HTTPConnection(self.upstream, timeout=60)
            connection.request("HEAD", self.path)
            found = connection.getresponse().status == 200
            connection.close()
            if found:
                self._error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
                return
            with self.looked:
                self.lookers[self.path] += 1
                self.looked.notify_all()
                self.looked.wait_for(lambda: self.lookers[self.path] > 1, timeout=_ALONE_S)
            del self.headers[_CONDITION]
        self._pass_on(body, None)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fault == "lost":
            self._reset()
            return
        self.send_response_only(answer.status, answer.reason)
        length = answer.headers.get("Content-Length", str(len(data)))
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        else:
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        """Ends the connection with a reset instead of a farewell."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _control(self) -> None:
        what, *rest = self.path.removeprefix(_CONTROL).split("/")
        with self.lock:
            if what == "fail":
                self.failing[rest[0]] = rest[1]
                self.holding.pop(rest[0], None)
            elif what == "hold":
                self.holding[rest[0]] = int(rest[1])
            data = json.dumps(self.counts).encode()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class QuietServer(ThreadingHTTPServer):
    """Takes many connections at once."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A connection that was reset, as by a client that was killed, is no error here."""


def main() -> None:
    upstream, share, seed = sys.argv[1:]
    _Handler.upstream = upstream.removeprefix("http://")
    _Handler.share, _Handler.random = float(share), random.Random(int(seed))
    server = QuietServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
