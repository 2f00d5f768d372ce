"""What tells that a file of the catalog is still what was written, of the same size though it may be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import obstore

from vlmflow.config import CatalogConfig
from vlmflow.retry import retried
from vlmflow.storage import STORE_ERRORS, access_error, open_store

_CHUNK_BYTES = 8 * 1024 * 1024


def checksum_of(file: Path) -> str:
    """Of a local file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checksum(config: CatalogConfig, path: str) -> str | None:
    """Of a file of the catalog, which is read through in pieces; None: it is not there.

    Raises:
        StorageAccessError, TransientError: it cannot be read.
    """
    store, prefix = open_store(config.uri, config.storage)
    name = f"{prefix.strip('/')}/{path}".lstrip("/")

    def read() -> str:
        digest = hashlib.sha256()
        for chunk in obstore.get(store, name).stream(min_chunk_size=_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()

    try:
        return retried(read)
    except FileNotFoundError:
        return None
    except STORE_ERRORS as error:
        raise access_error(error, config.uri) from error
