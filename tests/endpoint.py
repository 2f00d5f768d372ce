"""An OpenAI-compatible endpoint that behaves as a test wants: slow, busy, broken, or silent."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

# What the workers of the tests' cluster have in their environment.
KEY_VARIABLE, KEY = "VLMFLOW_TEST_KEY", "sk-very-secret-0123456789"


@dataclass(frozen=True)
class Reply:
    """What is answered to one request; ``body`` None: nothing, until the endpoint is closed."""

    body: bytes | None = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drips: bool = False  # byte by byte, without an end


def completion(text: object, **message: object) -> Reply:
    """An answer as the real ones look."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}}
    content = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}
    return Reply(json.dumps(content).encode(), headers={"Content-Type": "application/json"})


@dataclass(frozen=True)
class Asked:
    """One request, as the endpoint saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        content = self.body["messages"][0]["content"]
        return str(next(part["text"] for part in content if part["type"] == "text"))

    @property
    def jpeg(self) -> bytes:
        content = self.body["messages"][0]["content"]
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        head, data = url.split(",", 1)
        assert head == "data:image/jpeg;base64"
        return base64.b64decode(data)

    @property
    def colour(self) -> tuple[int, int, int]:
        """Of the middle of the image, to the nearest 16: JPEG moves colours a little."""
        image = Image.open(io.BytesIO(self.jpeg))
        pixel = image.getpixel((image.width // 2, image.height // 2))
        assert isinstance(pixel, tuple)
        red, green, blue = (round(value / 16) * 16 for value in pixel)
        return red, green, blue


@dataclass
class Endpoint:
    """A running endpoint: its address, and what it was asked."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def endpoint(answer: Callable[[Asked], Reply]) -> Iterator[Endpoint]:
    """Serves until the block ends; each request in a thread of its own."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers), body)
            with lock:
                here.asked.append(asked)
            self._send(answer(asked))

        def _send(self, reply: Reply) -> None:
            self.close_connection = True
            if reply.body is None:
                here.closing.wait()
                return
            try:
                self.send_response(reply.status)
                self.send_header("Connection", "close")  # or a client asks again by what is about to be closed
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if not reply.drips:
                    self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                while reply.drips and not here.closing.wait(0.05):
                    self.wfile.write(b" ")
            except OSError:
                pass  # the client has gone, as it should

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    here = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield here
    finally:
        here.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
