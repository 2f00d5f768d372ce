"""What a local disk does to tables that a store does not: it keeps users out, and loses power within a file."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError
from vlmflow.storage import access_error, parse_address

_FILLED_S = 1.0
_ENTRY = re.compile(r"(\d{20})(\.json|\.checkpoint\..*parquet)")


def may_be_absent(folder: Folder, name: str) -> None:
    """Makes sure that a table is absent that deltalake does not find: to it, folders of others look so, too.

    Raises:
        StorageAccessError: the disk does not let this user see.
    """
    address = parse_address(folder.config.uri)
    try:
        if address.is_local:
            Path(address.path, name, "_delta_log").stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise access_error(error, folder.config.uri) from error


def _is_filled(commit: Path) -> bool:
    """Whether a commit holds something, or does in a moment: other programs make the file, and then write to it."""
    until = time.monotonic() + _FILLED_S
    try:
        while not (size := commit.stat().st_size) and time.monotonic() < until:
            time.sleep(_FILLED_S / 10)
    except OSError:  # old, and removed meanwhile; or deltalake cannot read it either
        return True
    return size > 0


def check_log(folder: Folder, name: str) -> None:
    """Makes sure that no commit of a table on a disk is empty, as a loss of power leaves what was written last.

    To deltalake such a commit says nothing: its rows would be gone, and those come back that it replaced or erased. Of
    a folder that cannot be looked at nothing is said here: deltalake cannot open the table either.

    Raises:
        CatalogError: one is.
    """
    uri = folder.config.uri
    address = parse_address(uri)
    if not address.is_local:  # stores put a file whole, or not at all
        return
    try:
        with os.scandir(Path(address.path, name, "_delta_log")) as found:
            entries = [(match, entry) for entry in found if (match := _ENTRY.fullmatch(entry.name))]
    except OSError:
        return
    held = max((int(match[1]) for match, _ in entries if match[2] != ".json"), default=-1)  # by a checkpoint
    commits = sorted((int(match[1]), entry) for match, entry in entries if match[2] == ".json" and int(match[1]) > held)
    for number, entry in commits:
        if _is_filled(Path(entry.path)):
            continue
        remedy = "Put the file back from a copy"
        if number == commits[-1][0]:
            remedy += ", or delete it: what it had is computed again, and an image erased by it is to be erased again"
        raise CatalogError(f"{uri}: {name}/_delta_log/{entry.name} is empty: the log is damaged", remedy=f"{remedy}.")
