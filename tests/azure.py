"""Azurite, a server that speaks the protocol of Azure's Blob Storage, on this machine.

It is looked for as ``azurite-blob`` on the PATH, or where the variable AZURITE_BLOB says (``npm install azurite`` puts
it into ``node_modules/.bin``). Version 3.37 or later: the listings of 3.35 do not begin where deltalake asks.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import obstore
import pytest

from tests.processes import free_port, started, wait_for
from vlmflow.config import StorageConfig
from vlmflow.storage import open_store

AZURITE = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
# The key that all such servers have, as their manual says.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class AzureServer:
    """A running server; its containers live as long as it does."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.storage = StorageConfig(endpoint=endpoint, timeout_s=10, max_retries=1)

    def make_container(self) -> str:
        """Creates a container, under a name of its own."""
        name = f"test-{uuid4().hex[:12]}"
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        version = "2021-08-06"
        empty = "\n" * 12
        signed = f"PUT{empty}x-ms-date:{date}\nx-ms-version:{version}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        headers = {
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{_signature(signed)}",
            "Content-Type": "",
        }
        url = f"{self.endpoint}/{name}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, data=b"", headers=headers, method="PUT")).close()
        return name

    def upload(self, container: str, prefix: str, paths: list[Path]) -> None:
        """Stores files under a prefix."""
        store, _ = open_store(f"az://{container}", self.storage)
        for path in paths:
            obstore.put(store, f"{prefix}/{path.name}", path.read_bytes())


def sas_token(container: str, permissions: str) -> str:
    """A token for one container, with rights such as ``rl`` (read, list) or ``racwdl`` (all)."""
    version, ends = "2020-12-06", "2099-01-01T00:00:00Z"
    resource = f"/blob/{ACCOUNT}/{container}"
    signed = "\n".join([permissions, "", ends, resource, "", "", "", version, "c", "", "", "", "", "", "", ""])
    parts = {"sp": permissions, "se": ends, "sv": version, "sr": "c", "sig": _signature(signed)}
    return urllib.parse.urlencode(parts)


def _signature(text: str) -> str:
    return base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()


@contextmanager
def running_azure_server(folder: Path) -> Iterator[AzureServer]:
    """Runs a server on a free port, with its credentials in the environment, which child processes inherit."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = [str(AZURITE), "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    log = folder / "azurite.log"
    with started(command, log) as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AZURE_")]:
            patch.delenv(name)
        patch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        patch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        wait_for(lambda: b"successfully listens" in log.read_bytes(), server)
        yield AzureServer(endpoint)
