"""The catalog's folder on a store: small files and Parquet files by their path in it."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from vlmflow.catalog.exclusive import PROBE, check_exclusive, create
from vlmflow.catalog.file_info import UNFINISHED, FileInfo
from vlmflow.catalog.pieces import ParquetPieces
from vlmflow.config import CatalogConfig
from vlmflow.delta_table import delta_storage_options, delta_uri
from vlmflow.errors import CatalogChangedError, CatalogError, VlmflowError
from vlmflow.paths import is_folder, is_there
from vlmflow.retry import retried
from vlmflow.storage import STORE_ERRORS, access_error, open_store, parse_address, wherever
from vlmflow.workspace import in_our_words

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger("vlmflow")

_DELETED_AT_ONCE = 500
_TABLES = ("images", "embeddings")


class Folder:
    """Files under the catalog's uri. Picklable: a worker opens its own store on first use."""

    _is_exclusive = False  # not yet known to be

    def __init__(self, config: CatalogConfig) -> None:
        self.config = config

    def __getstate__(self) -> dict[str, object]:
        return {"config": self.config.model_copy(update={"uri": wherever(self.config.uri)})}

    def table_uri(self, table: str) -> str:
        """Where the Delta table ``table`` lies, as deltalake takes it.

        Raises:
            ConfigError: deltalake cannot open a table there.
        """
        return delta_uri(parse_address(self.config.uri), table)

    @property
    def storage_options(self) -> dict[str, str]:
        """The options under which deltalake opens the same store."""
        return delta_storage_options(self.config.storage, self.config.uri)

    def check_access(self) -> None:
        """Makes sure that the store can be listed, before deltalake says so in its own words.

        Raises:
            CatalogError: the place is a file.
            StorageAccessError: the bucket does not exist, or refuses.
            TransientError: the store is out of reach.
        """
        address = parse_address(self.config.uri)
        if address.is_local:
            with self._in_our_words():  # a folder on the way may be another user's
                existing = next(path for path in (Path(address.path), *Path(address.path).parents) if is_there(path))
            if not is_folder(existing):
                raise CatalogError(f"{existing} is a file", remedy="Name a folder for the catalog.")
            return
        with self._in_our_words():
            prefix = self._at("images/_delta_log")
            retried(lambda: next(iter(obstore.list(self._store, prefix=prefix, chunk_size=1)), None))

    def check_exclusive(self) -> None:
        """Makes sure, once, that the store refuses to overwrite; see :mod:`vlmflow.catalog.exclusive`."""
        if not self._is_exclusive and not parse_address(self.config.uri).is_local:
            with self._in_our_words():
                check_exclusive(self._store, self._at(PROBE), self.config.uri)
        self._is_exclusive = True

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None: there is none."""
        with self._in_our_words():
            try:
                return retried(lambda: bytes(obstore.get(self._store, self._at(path)).bytes()))
            except FileNotFoundError:
                return None

    def read_json(self, path: str) -> dict[str, Any] | None:
        """The object that a JSON file holds; None: there is no file.

        Raises:
            CatalogError: the file holds something else.
        """
        data = self.read(path)
        try:
            held = {} if data is None else json.loads(data)
        except (ValueError, RecursionError):  # of what is no UTF-8, too
            held = None
        if not isinstance(held, dict):
            what = f"{self.config.uri}: {path} is damaged: it is no JSON object"
            raise CatalogError(what, remedy="Put it back from a copy, or remove it.")
        return None if data is None else held

    def write(self, path: str, data: bytes, *, content_type: str | None = None) -> None:
        """Puts a file in one step, in place of one that is there.

        Args:
            content_type: what a store is to say that it is; a local disk says nothing.
        """
        local = parse_address(self.config.uri).is_local
        attributes = None if content_type is None or local else {"Content-Type": content_type}
        with self._in_our_words():
            retried(lambda: obstore.put(self._store, self._at(path), data, attributes=attributes))

    def create(self, path: str) -> bool:
        """Puts an empty file; False: there is one, of another or of ourselves, where the store's answer was lost."""
        with self._in_our_words():
            return create(self._store, self._at(path))

    def upload(self, path: str, file: Path) -> None:
        """Puts a local file in place in one step, piece by piece: it need not fit into memory."""
        with self._in_our_words():
            retried(lambda: obstore.put(self._store, self._at(path), file))

    def local_copy(self, path: str, folder: Path, size_bytes: int) -> Path:
        """A file that never changes, on the local disk: the catalog's own, or a copy of it in a local folder.

        Args:
            size_bytes: of the file; a copy of this size that is there already is taken as it is.

        Raises:
            CatalogError: the file is not there.
            WorkspaceError: there is no room for the copy.
        """
        address = parse_address(self.config.uri)
        if address.is_local:
            return Path(address.path) / path
        target = folder / path.replace("/", "-")
        if is_there(target) and target.stat().st_size == size_bytes:
            return target
        with self._in_our_words():
            try:
                retried(lambda: self._download(path, target))
            except FileNotFoundError as error:
                raise CatalogError(f"{self.config.uri}: {path} is gone", remedy="Run it again.") from error
        return target

    def drop_copies(self, folder: Path, below: str) -> None:
        """Removes from a local folder the copies of files, of those under a sub-folder, that are there no more."""
        copies = list(folder.iterdir())
        if not copies:
            return
        held = {file.path.replace("/", "-") for file in self.list(below)}
        for copy in copies:
            if copy.name not in held:
                copy.unlink()

    def _download(self, path: str, target: Path) -> None:
        chunks = obstore.get(self._store, self._at(path)).stream(min_chunk_size=8 * 1024 * 1024)
        with in_our_words(), target.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def delete(self, path: str) -> None:
        """Removes a file; one that is not there is no error."""
        # Object stores say nothing of a missing object, a local disk does.
        with self._in_our_words(), contextlib.suppress(FileNotFoundError):
            if self._is_unfinished(path):
                Path(parse_address(self.config.uri).path, path).unlink()
            else:
                retried(lambda: obstore.delete(self._store, self._at(path)))

    def delete_all(self, paths: Sequence[str]) -> list[str]:
        """Removes many files; returns those that could not be removed. One that is not there is no error."""
        failed = [path for path in paths if self._is_unfinished(path) and not self._deleted(path)]
        paths = [path for path in paths if not self._is_unfinished(path)]
        for start in range(0, len(paths), _DELETED_AT_ONCE):
            some = paths[start : start + _DELETED_AT_ONCE]
            try:
                names = [self._at(path) for path in some]
                retried(lambda names=names: obstore.delete(self._store, names))  # type: ignore[misc]
            except STORE_ERRORS:  # of one of them, and it does not say which
                failed += [path for path in some if not self._deleted(path)]
        return failed

    def _deleted(self, path: str) -> bool:
        try:
            self.delete(path)
        except VlmflowError as error:
            logger.warning("%s could not be deleted: %s", path, error)
            return False
        return True

    def stat(self, path: str) -> FileInfo | None:
        """Size and time of a file; None: there is none."""
        with self._in_our_words():
            try:
                meta = retried(lambda: obstore.head(self._store, self._at(path)))
            except FileNotFoundError:
                return None
        return FileInfo(path, meta["size"], meta["last_modified"])

    def list(self, below: str) -> Iterator[FileInfo]:
        """The files under a sub-folder, at any depth; hidden ones are other programs' (macOS, Jupyter, Hadoop)."""
        skip = len(self._at(""))
        with self._in_our_words():
            # Whole, before the first is given out: a listing that breaks off is made again.
            pages = retried(lambda: list(obstore.list(self._store, prefix=self._at(below))))
        for page in pages:
            for meta in page:
                path = meta["path"][skip:]
                if not path.startswith(".") and "/." not in path:
                    yield FileInfo(path, meta["size"], meta["last_modified"])

    def folders(self) -> Sequence[str]:
        """The names of its sub-folders; what lies in them is not listed."""
        with self._in_our_words():
            found = retried(lambda: obstore.list_with_delimiter(self._store, prefix=self._at("")))
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def unfinished(self, below: str) -> Iterator[FileInfo]:
        """The files under a sub-folder, at any depth, that somebody is writing or was when he died.

        Object stores show nothing of a file before it is whole: there are none.
        """
        address = parse_address(self.config.uri)
        if not address.is_local:
            return
        root, found = Path(address.path), []
        with self._in_our_words():
            for place, _, names in os.walk(root / below, onerror=_unless_absent):
                for file in (Path(place, name) for name in names if UNFINISHED.fullmatch(name)):
                    with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                        status = file.stat()
                        changed = dt.datetime.fromtimestamp(status.st_mtime, dt.UTC)
                        found.append(FileInfo(file.relative_to(root).as_posix(), status.st_size, changed))
        yield from found

    def write_parquet(self, path: str, rows: pa.Table | Iterator[pa.Table], **options: Any) -> int:
        """Writes rows as one Parquet file in one step; returns its size in bytes.

        Args:
            rows: a table, or one after the other, at least one: each begins a row group, and is then let go of.
            options: of :func:`pyarrow.parquet.write_table`.
        """
        row_group_size = options.pop("row_group_size", None)
        parts = iter([rows]) if isinstance(rows, pa.Table) else rows
        part = next(parts)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, part.schema, compression="zstd", **options) as writer:
            while part is not None:
                writer.write_table(part, row_group_size)
                part = next(parts, None)
        data = sink.getvalue()
        with self._in_our_words():
            retried(lambda: obstore.put(self._store, self._at(path), memoryview(data).cast("B")))
        return cast(int, data.size)

    def read_parquet(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads one Parquet file, whole columns of it.

        Raises:
            CatalogError: the file is damaged, or not there; CatalogChangedError: since another has replaced it.
        """
        with self._parquet(path):
            file = ParquetPieces(self._store, self._at(path), whole=columns is None)
            return file.read(range(len(file.row_groups)), columns)

    def read_parquet_at(
        self,
        path: str,
        columns: Sequence[str],
        rows: npt.NDArray[np.int64],
        cache: OrderedDict[tuple[str, int], pa.Table],
        max_cached: int,
    ) -> pa.Table:
        """Reads single rows of one Parquet file: of its row groups those that hold them.

        Args:
            rows: their numbers, (N,); the result is in this order.
            cache: row groups that were read before, by path and number; at most ``max_cached`` stay in it. The
                caller keeps one for the same columns of a path.

        Raises:
            CatalogError: the file is damaged, has fewer rows, or is not there; CatalogChangedError: since another has
                replaced it.
        """
        with self._parquet(path):
            file = ParquetPieces(self._store, self._at(path))
            ends = np.cumsum(file.row_groups)
            if len(rows) and (not len(ends) or rows.max() >= ends[-1]):
                raise CatalogError(f"{self.config.uri}: {path} has fewer rows than it had")
            groups = np.searchsorted(ends, rows, side="right")
            parts, order = [], []
            for group in np.unique(groups).tolist():
                key = (path, group)
                if key not in cache:
                    cache[key] = file.read([group], columns)
                cache.move_to_end(key)
                mine = np.flatnonzero(groups == group)
                parts.append(cache[key].take(pa.array(rows[mine] - (ends[group] - file.row_groups[group]))))
                order.append(mine)
        while len(cache) > max_cached:
            cache.popitem(last=False)
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order), kind="stable")))

    @contextlib.contextmanager
    def _parquet(self, path: str) -> Iterator[None]:
        """Says in our words what is wrong with one file, and what with the store."""
        remedy = "Restore the file from a copy; or take it away, if another program has put it there."
        if path.startswith(tuple(f"{name}/" for name in _TABLES)):
            remedy = "Restore the file, or roll the table back to a version that does not need it."
        with self._in_our_words():
            try:
                yield
            except FileNotFoundError as error:
                if not self._is_live(path):  # an erasure removes at once what it replaces, a vacuum after days
                    changed = f"{self.config.uri}: {path} is gone: the catalog has changed since it was looked up"
                    raise CatalogChangedError(changed, remedy="Run the same command again.") from error
                what = f"{self.config.uri}: {path} is gone although the table refers to it"
                raise CatalogError(what, remedy=remedy) from error
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
                # Arrow's words for bytes that it cannot decode; a plain OSError is never the store's.
                if isinstance(error, OSError) and type(error) is not OSError:
                    raise
                raise CatalogError(f"{self.config.uri}: {path} is damaged", remedy=remedy) from error

    def _is_live(self, path: str) -> bool:
        """Whether the newest version of a table names a file, be it there or not."""
        name, _, file = path.partition("/")
        if name not in _TABLES:
            return False
        try:
            table = retried(
                lambda: DeltaTable(self.table_uri(name), storage_options=self.storage_options),
                (DeltaError, OSError),
                never=(TableNotFoundError,),
            )
        except TableNotFoundError:
            return False
        except (DeltaError, OSError) as error:
            raise access_error(error, self.config.uri) from error
        return file in map(unquote, pa.table(table.get_add_actions())["path"].to_pylist())

    def _is_unfinished(self, path: str) -> bool:
        return parse_address(self.config.uri).is_local and UNFINISHED.fullmatch(path) is not None

    @contextlib.contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except STORE_ERRORS as error:
            raise access_error(error, self.config.uri) from error

    @cached_property
    def _opened(self) -> tuple[ObjectStore, str]:
        return open_store(self.config.uri, self.config.storage)

    @property
    def _store(self) -> ObjectStore:
        return self._opened[0]

    def _at(self, path: str) -> str:
        prefix = self._opened[1].strip("/")
        return f"{prefix}/{path}" if prefix else path


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
