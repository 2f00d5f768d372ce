"""Whether a run may write to a catalog: asked before models are loaded, which takes minutes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import TableLog, TableName
from vlmflow.catalog.policies import POLICIES
from vlmflow.catalog.runs import RUNS
from vlmflow.errors import StorageAccessError
from vlmflow.storage import access_error, is_full, parse_address

# What a run writes to. The rights may differ: sub-folders are another user's where another ran first.
_WRITTEN = ("", "images", "images/_delta_log", "embeddings", "embeddings/_delta_log", RUNS, POLICIES)


def check_writable(folder: Folder) -> None:
    """Makes sure that a run can write its files, into a catalog that is there or into one that it is to make.

    Of a local disk nothing is left, not even by a process that is killed; of a store, the file by which
    :mod:`vlmflow.catalog.exclusive` sees that it refuses to overwrite.

    Raises:
        StorageAccessError: it cannot; or the store would let commits overwrite each other.
        StoreLostError: the disk is full.
        TransientError: the store is out of reach.
        UnsupportedTableError: another program has made of a table what vlmflow cannot read, or cannot write to.
    """
    address = parse_address(folder.config.uri)
    if address.is_local:
        _check_disk(folder)
    else:
        folder.check_exclusive()
    check_tables(folder)


def _check_disk(folder: Folder) -> None:
    address = parse_address(folder.config.uri)
    place = Path(address.path)
    try:
        for path in [place / below for below in _WRITTEN]:
            place = path
            # Where making it begins. A link that leads nowhere is there: no folder can be made in its place.
            place = next(place for place in (path, *path.parents) if os.path.lexists(place))
            # Not by its permissions: a disk may be mounted for reading, and a server of files has rules of its own.
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        if is_full(error):
            raise access_error(error, folder.config.uri) from error
        remedy = "Check its owner, its permissions and how it is mounted, or name another folder for the catalog."
        raise StorageAccessError(f"{address} cannot be written: {place}: {error.strerror}", remedy=remedy) from error


def check_tables(folder: Folder) -> None:
    """Makes sure that the tables which are there, should there be any, can be read and committed to.

    Raises:
        UnsupportedTableError: another program has made of one what vlmflow cannot read, or cannot write to.
        StorageAccessError, TransientError: it cannot be looked at.
    """
    names: tuple[TableName, ...] = ("images", "embeddings")
    for name in names:
        if TableLog.exists(folder, name):
            TableLog.open(folder, name).check_writable()
