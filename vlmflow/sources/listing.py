"""Listing a prefix or a folder as Arrow batches: ``uri``, ``object_version``, ``size_bytes``.

Names that start with a dot or an underscore are left out, folders as well as files: ``.DS_Store``, ``_SUCCESS``,
``_delta_log``. Not so a file with an underscore and the extension of an image: cameras write ``_DSC0001.JPG``. The
catalog is left out, where it lies among the images. Everything else is listed, whatever its extension.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.errors import SourceError, StorageAccessError
from vlmflow.paths import is_folder
from vlmflow.retry import retried
from vlmflow.sources.base import BATCH_ROWS
from vlmflow.sources.stores import Failure, Stores
from vlmflow.storage import STORE_ERRORS, Address, Fault, access_error, local_version, parse_address, passes
from vlmflow.threads import interruptible

if TYPE_CHECKING:
    from obstore.store import ObjectStore

LISTING = pa.schema([("uri", pa.string()), ("object_version", pa.string()), ("size_bytes", pa.int64())])

_IMAGES = "avif|bmp|gif|hei[cf]|hif|jfif|jpe?g|png|tiff?|webp|m4v|mkv|mov|mp4|webm"
HIDDEN = re.compile(rf"(^|/)(\.|_(?![^/]*\.({_IMAGES})\Z))", re.IGNORECASE)


def list_objects(uri: str, stores: Stores, catalog: Address | None) -> Iterator[pa.RecordBatch]:
    """Yields batches of ``LISTING``; of a local folder in the order of names, of a store in its own.

    Args:
        catalog: of the same store; nothing below it is listed.

    Raises:
        SourceError: the folder does not exist, or a name in it cannot be expressed.
        StorageAccessError: the store refused, or is not there.
        TransientError: the store is out of reach.
    """
    address = parse_address(uri)
    return _list_local(address, catalog) if address.is_local else _list_store(address, stores, catalog)


def list_files(uri: str, extension: str | tuple[str, ...], stores: Stores, catalog: Address | None) -> Sequence[str]:
    """The files of one kind: the uri itself if it names one, else those under it. For files of many images each.

    Args:
        catalog: as of :func:`list_objects`.

    Raises:
        As :func:`list_objects`.
    """
    address = parse_address(uri)
    # Folders may be called as files are: Spark writes one where it is told a file.
    may_be_one = str(address).lower().endswith(extension)
    try:
        if may_be_one and not (is_folder(Path(address.path)) if address.is_local else _is_no_object(uri, stores)):
            return [str(address)]
    except OSError as error:
        raise access_error(error, str(address)) from error
    found = [name for batch in list_objects(uri, stores, catalog) for name in batch["uri"].to_pylist()]
    files = sorted(name for name in found if name.lower().endswith(extension))
    return files or ([str(address)] if may_be_one and not address.is_local else [])


def _is_no_object(uri: str, stores: Stores) -> bool:
    try:
        stores.head(uri)
    except SourceError:
        return True
    return False


def _hidden(names: pa.Array) -> pa.Array:
    may_be = pc.match_substring_regex(names, "(^|/)[._]")  # Arrow's expressions look at nothing ahead
    if not pc.any(may_be).as_py():
        return may_be
    return pa.array([HIDDEN.search(name) is not None for name in names.to_pylist()])


def _list_store(address: Address, stores: Stores, catalog: Address | None) -> Iterator[pa.RecordBatch]:
    store, prefix = stores.locate(str(address))
    skip = len(prefix) + 1 if prefix else 0
    try:
        for batch in _pages(store, prefix or None):
            names = pc.utf8_slice_codeunits(batch["path"], start=skip)
            shown = pc.and_(pc.not_equal(names, ""), pc.invert(_hidden(names)))
            if catalog is not None:
                shown = pc.and_(shown, pc.invert(pc.starts_with(batch["path"], f"{catalog.path}/")))
            batch = batch.filter(shown)
            uris = pc.binary_join_element_wise(address.root, batch["path"], "/")
            listed = pa.RecordBatch.from_arrays(
                [uris, _versions(batch), batch["size"].cast(pa.int64())], schema=LISTING
            )
            yield _without_folder_markers(listed, stores)
    except STORE_ERRORS as error:
        raise access_error(error, str(address)) from error


def _pages(store: ObjectStore, prefix: str | None) -> Iterator[pa.RecordBatch]:
    """The pages of a listing; one that breaks off goes on behind the last name that it gave."""
    last: str | None = None
    pages = _listing_from(store, prefix, last)
    while True:
        try:
            page = interruptible(partial(next, pages, None))
        except STORE_ERRORS as error:
            if not passes(error):
                raise
            offset = last
            pages, page = retried(lambda offset=offset: _first_page(store, prefix, offset))  # type: ignore[misc]
        if page is None:
            return
        batch = pa.record_batch(page)
        if batch.num_rows:
            last = pc.max(batch["path"]).as_py()
        yield batch


def _listing_from(store: ObjectStore, prefix: str | None, offset: str | None) -> Iterator[Any]:
    return iter(obstore.list(store, prefix, offset=offset, chunk_size=BATCH_ROWS, return_arrow=True))


def _first_page(store: ObjectStore, prefix: str | None, offset: str | None) -> tuple[Iterator[Any], Any]:
    pages = _listing_from(store, prefix, offset)
    return pages, next(pages, None)


def _versions(batch: pa.RecordBatch) -> pa.Array:
    """As ``storage.object_version`` has them, for a whole page."""
    versions = pc.utf8_trim(batch["e_tag"], '"')
    if versions.null_count == 0:
        return versions
    times, sizes = batch["last_modified"].cast(pa.int64()).to_pylist(), batch["size"].to_pylist()
    return pc.coalesce(versions, pa.array([f"{time:x}-{size:x}" for time, size in zip(times, sizes, strict=True)]))


def _without_folder_markers(listed: pa.RecordBatch, stores: Stores) -> pa.RecordBatch:
    """Drops the empty objects ``folder/`` that consoles create: listed without their slash, they cannot be read."""
    empty = listed["uri"].filter(pc.equal(listed["size_bytes"], 0))
    if len(empty) == 0:
        return listed
    uris = empty.to_pylist()
    heads = zip(uris, stores.heads(uris), strict=True)
    markers = [uri for uri, head in heads if isinstance(head, Failure) and head.fault is Fault.MISSING]
    return listed.filter(pc.invert(pc.is_in(listed["uri"], pa.array(markers, pa.string()))))


def _list_local(address: Address, catalog: Address | None) -> Iterator[pa.RecordBatch]:
    """Lists by hand: obstore leaves out names that end in ``#1``, as its own unfinished uploads do."""
    rows: list[tuple[str, str | None, int | None]] = []
    try:
        root = Path(address.path).stat()
        passed = {(root.st_dev, root.st_ino), *_folder_ids(catalog)}
        for path, status in _walk(address.path, frozenset(passed)):
            rows.append((path, local_version(status) if status else None, status.st_size if status else None))
            if len(rows) == BATCH_ROWS:
                yield _local_batch(rows)
                rows = []
    except FileNotFoundError as error:
        raise SourceError(f"{error.filename} does not exist", remedy="Check the path.") from error
    except NotADirectoryError as error:
        remedy = "Name its folder, or a manifest (.csv, .jsonl, .parquet) or a .tar of images."
        raise SourceError(f"{address.path} is a file", remedy=remedy) from error
    except PermissionError as error:
        remedy = "Check the permissions."
        raise StorageAccessError(f"{error.filename} may not be listed", remedy=remedy) from error
    except OSError as error:  # a mount whose server is gone
        raise access_error(error, str(address)) from error
    if rows:
        yield _local_batch(rows)


def _local_batch(rows: list[tuple[str, str | None, int | None]]) -> pa.RecordBatch:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), LISTING, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _folder_ids(catalog: Address | None) -> list[tuple[int, int]]:
    """Device and inode of the catalog's folder, by which it is known behind symbolic links too; none without one."""
    try:
        status = None if catalog is None else Path(catalog.path).stat()
    except OSError:  # it is not there yet; or it cannot be read, which opening it tells
        return []
    return [] if status is None else [(status.st_dev, status.st_ino)]


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yields the regular files below a folder, symbolic links followed; None for a link that leads nowhere.

    Args:
        above: device and inode of the folders that lead here, so that a link to one of them ends, and of the catalog.
    """
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not HIDDEN.search(entry.name)), key=lambda entry: entry.name)
    for entry in shown:
        _check_name(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            # What is gone was removed since the folder was looked into; else the read records why it cannot be had.
            if entry.is_symlink() or not isinstance(error, FileNotFoundError):
                yield entry.path, None
            continue
        if stat.S_ISREG(status.st_mode):
            yield entry.path, status
        elif (
            stat.S_ISDIR(status.st_mode)
            and not HIDDEN.search(f"{entry.name}/")  # `_x.jpg`, as in a store
            and (status.st_dev, status.st_ino) not in above
        ):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed meanwhile, or a file by now
                yield from _walk(entry.path, above | {(status.st_dev, status.st_ino)})


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        encoding = sys.getfilesystemencoding()
        if encoding != "utf-8":  # of LC_ALL=POSIX with PYTHONUTF8=0: the name itself may be right
            raise SourceError(
                f"{shown} cannot be read as a name: Python takes file names for {encoding} here",
                remedy="Set PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8.",
            ) from error
        raise SourceError(f"{shown} is not named in UTF-8", remedy="Rename it.") from error
