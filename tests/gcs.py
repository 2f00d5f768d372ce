"""A stand-in for Google Cloud Storage on this machine, spoken to over HTTP; a process of its own.

No server of Google's kind can be installed from a package index that speaks the XML API, which obstore and deltalake
use. That is nearly the protocol of S3 (https://cloud.google.com/storage/docs/xml-api/reference-headers), so this one
takes their requests to the tests' S3 server in that one's words: generations and the conditions on them, the source of
copies, percent-encoding of whole names. Access is Google's: by tokens that the machine's metadata server hands out,
which is this process too. And one object is written once a second at most
(https://cloud.google.com/storage/quotas#objects).
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tests.faulty_proxy import QuietServer
from vlmflow.config import StorageConfig

TOKEN = "ya29.token-of-the-machine"
READER = "ya29.token-of-a-reader"  # may write nothing
PUBLIC = "public"  # so begin names of buckets that anybody may read
_TOKENS = "/computeMetadata/v1/instance/service-accounts/default/token"
_CONTROL = "/__gcs__/"
_GENERATION, _CONDITION, _COPY = "x-goog-generation", "x-goog-if-generation-match", "x-goog-copy-source"
_ALONE_S = 1.0
# The server behind it takes any signature, and none for an anonymous request.
_SIGNATURE = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class GcsServer:
    """A running server; it has the buckets of the S3 server behind it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.storage = StorageConfig(endpoint=f"http://{address}", timeout_s=10, max_retries=2)

    @property
    def environment(self) -> dict[str, str]:
        """The variable by which programs of a machine of Google's find its metadata server."""
        return {"GCE_METADATA_HOST": self.address}

    def grant(self, token: str) -> None:
        """From now on the metadata server hands out this token; an empty one: none."""
        self._ask(f"grant/{token}")

    def num_refused(self) -> int:
        """How many writes of an object came too soon after the one before."""
        return int(self._ask("counts").get("too soon", 0))

    def _ask(self, what: str) -> dict[str, int]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            connection.request("GET", _CONTROL + what)
            answer: dict[str, int] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return answer


@contextmanager
def running_gcs_server(upstream: str) -> Iterator[GcsServer]:
    """Runs one in front of an S3 server's endpoint."""
    command = [sys.executable, "-m", "tests.gcs", upstream]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert process.stdout is not None
        yield GcsServer(f"127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    token = TOKEN
    counts: Counter[str] = Counter()
    generations: dict[str, tuple[int, float]] = {}  # of objects, and when they were written
    lock = threading.Lock()

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, mark, query = self.path.partition("?")
        if path.startswith(_CONTROL):
            self._control(path.removeprefix(_CONTROL))
        elif path == _TOKENS:
            self._hand_out()
        elif self._is_allowed(unquote(path).lstrip("/").partition("/")[0]):
            is_object = self.command in ("PUT", "DELETE") and not query
            with self.lock:  # one write after the other, as conditions are looked at
                written = self.generations.get(path, (0, 0.0)) if is_object else (0, 0.0)
                if self.headers.get(_CONDITION) not in (None, "0", str(written[0])):
                    self._error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
                    return
                if self.command == "PUT" and _CONDITION not in self.headers and time.time() - written[1] < _ALONE_S:
                    self.counts["too soon"] += 1
                    self._error(429, "SlowDown", "The rate limit for changes of this object was exceeded.")
                    return
                status, headers, data = self._passed_on(quote(unquote(path)) + mark + query, body)
                if is_object and status < 300:
                    if self.command == "DELETE":
                        self.generations.pop(path, None)
                    else:
                        self.generations[path] = (int(time.time() * 1e6), time.time())
                headers[_GENERATION] = str(self.generations.get(path, (1, 0.0))[0])
            self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815  names of the library

    def _is_allowed(self, bucket: str) -> bool:
        given = self.headers.get("Authorization")
        reads = self.command in ("GET", "HEAD")
        if given is None and reads and bucket.startswith(PUBLIC):
            return True
        if given == f"Bearer {TOKEN}" or (given == f"Bearer {READER}" and reads):
            return True
        if given is None:
            self._error(403, "AccessDenied", "Anonymous caller does not have storage.objects.get access.")
        elif given == f"Bearer {READER}":
            self._error(403, "AccessDenied", "The caller does not have storage.objects.create access.")
        else:
            self._error(401, "AuthenticationRequired", "Authentication required.")
        return False

    def _hand_out(self) -> None:
        if self.token and self.headers.get("Metadata-Flavor") == "Google":
            answer = {"access_token": self.token, "expires_in": 3599, "token_type": "Bearer"}
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        else:
            self._error(404, "NotFound", "The service account is not found.")

    def _passed_on(self, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        left_out = ("host", "authorization", _CONDITION, _COPY)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        headers |= {"Host": self.upstream, "Authorization": _SIGNATURE}
        if self.headers.get(_CONDITION) == "0":
            headers["If-None-Match"] = "*"
        if source := self.headers.get(_COPY):
            headers["x-amz-copy-source"] = source
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.request(self.command, target, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        left_out = ("transfer-encoding", "connection")
        return answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in left_out}, data

    def _error(self, status: int, code: str, message: str) -> None:
        data = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, {"Content-Type": "application/xml; charset=UTF-8"}, data.encode())

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _control(self, asked: str) -> None:
        what, _, given = asked.partition("/")
        if what == "grant":
            _Handler.token = given
        self._answer(200, {}, json.dumps(self.counts).encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def main() -> None:
    _Handler.upstream = sys.argv[1].removeprefix("http://")
    server = QuietServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
