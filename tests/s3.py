"""An S3-compatible server on this machine, spoken to over HTTP like any other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3

from vlmflow.config import StorageConfig

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
}


class S3Server:
    """A running server; its buckets live as long as it does."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client: Any = boto3.client("s3", endpoint_url=endpoint)

    @property
    def storage(self) -> StorageConfig:
        """How vlmflow reaches it; it gives up soon."""
        return StorageConfig(endpoint=self.endpoint, region="us-east-1", timeout_s=10, max_retries=1)

    def make_bucket(self) -> str:
        """Creates a bucket, under a name of its own."""
        name = f"test-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Stores an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def upload(self, bucket: str, prefix: str, folder: Path) -> None:
        """Stores all files of a folder under a prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """Runs a server on a free port, with dummy credentials in the environment, which child processes inherit."""
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    port = _free_port()
    # A process of its own: deltalake holds the interpreter's lock while it waits for the store's answer.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        server.kill()  # nothing of it is kept
        server.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Waits until the server takes connections, at most some minutes."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the S3 server did not start (exit code {server.poll()})")
