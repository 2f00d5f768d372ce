"""An HTTP proxy on this machine that leads every name to one port of it, and certificates for servers of that."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import http.server
import ipaddress
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ANSWERS = {"forbidden.example": 403, "dead.example": 502}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self) -> None:
        if self._is_let_through(self.path.rpartition(":")[0]):
            self.send_response(200)
            self.end_headers()
            self._splice(b"")
        self.close_connection = True

    def do_GET(self) -> None:
        host = self.path.partition("://")[2].partition("/")[0].partition(":")[0]
        if self._is_let_through(host):
            path = "/" + self.path.partition("://")[2].partition("/")[2]
            self._splice(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        self.close_connection = True

    def _is_let_through(self, host: str) -> bool:
        proxy: WebProxy = self.server  # type: ignore[assignment]
        proxy.asked.append((self.command, host))
        wanted = f"Basic {base64.b64encode(proxy.user.encode()).decode()}" if proxy.user else None
        status = 407 if self.headers["Proxy-Authorization"] != wanted else ANSWERS.get(host, 200)
        if status != 200:
            self.send_response(status, f"no, {proxy.user}")  # which nobody should repeat
            self.send_header("Content-Length", "0")
            self.end_headers()
        return status == 200

    def _splice(self, first: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as onward:  # type: ignore[attr-defined]
            onward.sendall(first)
            back = threading.Thread(target=_copy, args=(onward, self.connection), daemon=True)
            back.start()
            if not first:
                _copy(self.connection, onward)
            back.join()

    def log_message(self, *_: object) -> None:
        pass


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class WebProxy(http.server.ThreadingHTTPServer):
    """The proxy; ``asked`` has the method and host of every request.

    Args:
        port: of this machine, where all requests go.
        user: with a colon and the password; "": none is asked for.
    """

    daemon_threads = True

    def __init__(self, port: int, user: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.user = port, user
        self.asked: list[tuple[str, str]] = []

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests


@contextlib.contextmanager
def proxying(port: int, user: str = "") -> Iterator[WebProxy]:
    """Runs the proxy until the end of the block."""
    server = WebProxy(port, user)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def certificate(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate that vouches for itself, for names and 127.0.0.1: its file, and what a server needs to show it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vlmflow tests")])
    now = dt.datetime.now(dt.UTC)
    hosts: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    hosts.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    both = folder / "both.pem"
    shutil.copy(file, both)
    with both.open("ab") as out:
        out.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return file, context
