"""Reading the bytes of references, wherever they are: the local disk, a store, an http server, a Parquet file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import obstore
import pyarrow as pa

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import (
    ConfigError,
    ImageError,
    RowErrorClass,
    StorageAccessError,
    StoreLostError,
    TransientError,
    VlmflowError,
)
from vlmflow.retry import retried_async
from vlmflow.sources.base import Fetched
from vlmflow.sources.disk import Home, check_files, check_folder, see_file, see_folder
from vlmflow.sources.parquet_rows import is_damage, read_cells
from vlmflow.sources.stores import CONCURRENT_REQUESTS, Failure, Silence, Stores, run_in_loop
from vlmflow.sources.uris import is_http
from vlmflow.storage import (
    STORE_ERRORS,
    Fault,
    fault_of,
    local_version,
    object_version,
    parse_address,
    wherever,
)
from vlmflow.threads import in_thread

if TYPE_CHECKING:
    from obstore import GetOptions

    from vlmflow.sources.downloads import Downloads

GONE = "listed, but gone when read"

_READS = 3  # of a file that changes meanwhile
_COLUMNS = ["object_version", "size_bytes", "locator", "offset", "length", "row"]

_FAULT_CLASSES = {
    Fault.MISSING: (RowErrorClass.MISSING, GONE),
    Fault.DENIED: (RowErrorClass.ACCESS_DENIED, "the store refused this object"),
    Fault.TIMEOUT: (RowErrorClass.READ_TIMEOUT, "the store did not answer in time, after all retries"),
    Fault.TRANSIENT: (RowErrorClass.READ_FAILED, "the store failed, after all retries"),
    Fault.PATH: (RowErrorClass.READ_FAILED, "the store's client cannot express this name"),
    Fault.CHANGED: (RowErrorClass.READ_FAILED, "the file that holds it was changed while it was read"),
    Fault.REGION: (RowErrorClass.READ_FAILED, "the bucket is in another region"),
}


class _Ref(TypedDict):
    object_version: str | None
    size_bytes: int | None
    locator: str
    offset: int | None
    length: int | None
    row: int | None
    previous_read: dict[str, Any] | None


class SourceReader:
    """The reader of every source; the references say how each of them is read.

    Args:
        home: of the source: while it is there, a file that fails is no more than that.
        stores: those of the source, which know what they have given to planning; None: they have given nothing yet.
        is_known: the config is the job's. If not, see :func:`vlmflow.sources.parquet_rows.read_cells`.
    """

    def __init__(
        self,
        config: SourceConfig,
        limits: ImageLimits,
        home: Home,
        stores: Stores | None = None,
        *,
        is_known: bool = True,
    ) -> None:
        self._config = config
        self._limits = limits
        self._home = home
        self._folder = Path(parse_address(home.uri).path) if _is_local(home.uri) else None
        self._stores = stores or Stores(config.storage)
        self._is_known = is_known

    def __reduce__(self) -> tuple[partial[SourceReader], tuple[SourceConfig, ImageLimits, Home, Stores]]:
        made = partial(SourceReader, is_known=self._is_known)
        config = self._config.model_copy(update={"uri": wherever(self._config.uri)})
        return (made, (config, self._limits, self._home, self._stores))

    def read(self, refs: pa.Table) -> list[Fetched]:
        """Reads one image for each reference, in order; see :class:`vlmflow.sources.base.Reader`."""
        known = refs["previous_read"].to_pylist() if "previous_read" in refs.column_names else [None] * refs.num_rows
        pairs = zip(refs.select(_COLUMNS).to_pylist(), known, strict=True)
        rows: list[Any] = [row | {"previous_read": previous} for row, previous in pairs]
        if self._folder is not None:
            see_folder(self._folder, anew=False)
        try:
            results = run_in_loop(self._read_all(rows))
            self._raise_if_lost(rows, results)
        except StoreLostError:
            raise
        except (StorageAccessError, TransientError) as error:
            remedy = f"{error.remedy} What was committed stays; run again."
            raise StoreLostError(f"lost in mid-run: {error}", remedy=remedy) from error
        return [self._recorded(result) for result in results]

    async def _read_all(self, rows: Sequence[_Ref]) -> list[Fetched | Failure]:
        """Reads all rows; ends early, with an error, where a store has fallen silent."""
        slots, silence = asyncio.Semaphore(CONCURRENT_REQUESTS), Silence(self._stores)
        results: dict[int, Fetched | Failure] = {}
        http = None
        if any(is_http(row["locator"]) for row in rows):
            from vlmflow.sources.downloads import downloads_of  # its libraries take a worker a quarter of a second

            http = downloads_of(self._config.http)

        async def read(index: int) -> None:
            async with slots:
                result = await self._read_one(rows[index], http)
                if _came_of_store(rows[index], result):
                    await silence.check(rows[index]["locator"], result)
            results[index] = result

        async def read_parquet(uri: str, indices: Sequence[int]) -> None:
            async with slots:
                cells = await in_thread(partial(self._read_parquet, uri, [rows[index] for index in indices]))
                await silence.check(uri, cells[0])
            results.update(zip(indices, cells, strict=True))

        files: dict[str, list[int]] = {}
        whole = []
        for index, row in enumerate(rows):
            if row["row"] is None:
                whole.append(read(index))
            else:
                files.setdefault(row["locator"], []).append(index)
        await asyncio.gather(*whole, *(read_parquet(uri, indices) for uri, indices in files.items()))
        return [results[index] for index in range(len(rows))]

    async def _read_one(self, row: _Ref, http: Downloads | None) -> Fetched | Failure:
        locator = row["locator"]
        try:
            if http is not None and is_http(locator):
                return await self._download(row, http)
            self._check_size(row["length"] if row["length"] is not None else row["size_bytes"])
            if _is_local(locator):
                self._check_may_read_disk()
                return await asyncio.to_thread(self._read_file, row)
            return await retried_async(lambda: self._read_object(row))
        except ImageError as error:
            return Fetched(None, None, error.error_class, str(error))
        except ConfigError as error:  # an address of a kind that cannot be read costs its row, not the run
            return Fetched(None, None, RowErrorClass.READ_FAILED, str(error))
        except STORE_ERRORS as error:
            if is_http(locator):  # of a server that anyone may have named, and no word of a store
                return Fetched(None, None, RowErrorClass.READ_FAILED, f"the download failed ({type(error).__name__})")
            return Failure(fault_of(error), error)

    async def _download(self, row: _Ref, http: Downloads) -> Fetched:
        known = row["previous_read"]
        found = await http.fetch(row["locator"], known["http_validator"] if known else None, self._limits.max_bytes)
        if found is None:
            assert known is not None
            return Fetched(None, known["object_version"], None, "", known["http_validator"], known)
        # The manifest's word, where it has one: the next listing compares with it.
        return Fetched(found.data, row["object_version"] or found.object_version, None, "", found.validator)

    def _read_parquet(self, uri: str, rows: Sequence[_Ref]) -> list[Fetched | Failure]:
        """Reads rows of one Parquet file."""
        try:
            if _is_local(uri):
                self._check_may_read_disk()
            file, head = self._stores.open_file(uri)
            with file:
                numbers = [row["row"] or 0 for row in rows]
                cells = read_cells(file, self._config.bytes_column, numbers, is_known=self._is_known)
                if _is_local(uri):
                    self._see(Path(parse_address(uri).path))
        except ImageError as error:
            return [Fetched(None, None, error.error_class, str(error))] * len(rows)
        except VlmflowError as error:
            cause = error.__cause__
            if isinstance(cause, STORE_ERRORS) and not is_damage(cause):
                return [Failure(fault_of(cause), cause)] * len(rows)
            return [Fetched(None, None, RowErrorClass.READ_FAILED, str(error))] * len(rows)
        except STORE_ERRORS as error:
            return [Failure(fault_of(error), error)] * len(rows)
        return [self._cell(row, cells[row["row"] or 0], head.object_version) for row in rows]

    def _cell(self, row: _Ref, data: bytes | None, file_version: str) -> Fetched:
        try:
            version = row_version(file_version, row["row"] or 0)
            _check_unchanged(row, version)
            self._check_size(len(data or b""))
        except ImageError as error:
            return Fetched(None, None, error.error_class, str(error))
        if data is None:
            return Fetched(None, version, RowErrorClass.MISSING, "the cell is null")
        return Fetched(data, version, None, "")

    def _check_may_read_disk(self) -> None:
        if not _is_local(self._config.uri):
            message = "a manifest in a store must not name files of the local disk"
            raise ImageError(message, error_class=RowErrorClass.ADDRESS_REFUSED)

    def _check_size(self, size: int | None) -> None:
        if size is not None and size > self._limits.max_bytes:
            message = f"{size:,} bytes exceed limits.max_bytes of {self._limits.max_bytes:,}"
            raise ImageError(message, error_class=RowErrorClass.TOO_MANY_BYTES)

    def _read_file(self, row: _Ref) -> Fetched:
        path = Path(parse_address(row["locator"]).path)
        with path.open("rb") as file:
            for _ in range(_READS):
                status = os.fstat(file.fileno())
                version = local_version(status)
                start, num_bytes = row["offset"] or 0, row["length"]
                if num_bytes is None:
                    self._check_size(status.st_size)
                    num_bytes, told = self._limits.max_bytes, version
                else:
                    told = part_version(version, start, num_bytes)
                    _check_unchanged(row, told)
                file.seek(start)
                data = file.read(num_bytes)
                # Else who writes into it may have been half done: bytes of two images under the version of one.
                if local_version(os.fstat(file.fileno())) == version:
                    self._see(path)
                    return Fetched(data, told, None, "")
        raise ImageError("somebody is writing to it", error_class=RowErrorClass.READ_FAILED)

    def _see(self, path: Path) -> None:
        if self._folder is not None:
            see_file(path, self._folder)

    async def _read_object(self, row: _Ref) -> Fetched:
        store, path = self._stores.locate(row["locator"])
        start, length = row["offset"] or 0, row["length"]
        if length == 0:  # a range of no bytes is not a request that a store answers
            return Fetched(b"", row["object_version"], None, "")
        options: GetOptions = {} if length is None else {"range": (start, start + length)}
        found = await obstore.get_async(store, path, options=options)
        version = object_version(found.meta)
        if length is None:
            self._check_size(found.meta["size"])  # the body is not read before
        else:
            version = part_version(version, start, length)
            _check_unchanged(row, version)
        return Fetched(bytes(await found.bytes_async()), version, None, "")

    def _recorded(self, result: Fetched | Failure) -> Fetched:
        if isinstance(result, Fetched):
            return result
        error_class, message = _FAULT_CLASSES[result.fault]
        if result.fault is Fault.TRANSIENT and type(result.error) is OSError:  # of a disk, which is asked once
            message = f"it cannot be read: {result.error.strerror}"
        return Fetched(None, None, error_class, message)

    def _raise_if_lost(self, rows: Sequence[_Ref], results: Sequence[Fetched | Failure]) -> None:
        """Ends the run where a store, and not an object of it, is what failed."""
        asked = [
            (row["locator"], result) for row, result in zip(rows, results, strict=True) if _came_of_store(row, result)
        ]
        for uri, result in asked:
            if isinstance(result, Fetched) and not _is_local(uri):
                self._stores.has_read(uri)
        self._check_disk([(uri, result) for uri, result in asked if _is_local(uri)])
        self._stores.check_answered([uri for uri, _ in asked], [result for _, result in asked])

    def _check_disk(self, read: Sequence[tuple[str, Fetched | Failure]]) -> None:
        """Of files that failed: whether the source's folder is there and, if all did, one that was read before."""
        folder, mount = self._folder, self._home.mount
        failed = [uri for uri, result in read if isinstance(result, Failure)]
        if folder is None or not read:
            return
        if failed:
            is_listed = parse_address(self._config.uri) == parse_address(self._home.uri)
            check_folder(folder, mount, is_listed=is_listed)
        if len(failed) == len(read):
            check_files(folder, mount, [Path(parse_address(uri).path) for uri in failed])
        else:
            see_folder(folder, anew=True)


def _came_of_store(row: _Ref, result: Fetched | Failure) -> bool:
    """Whether a result tells how the store is that holds the image; what was refused unread tells nothing."""
    return isinstance(result, Failure) or (result.data is not None and not is_http(row["locator"]))


def _is_local(uri: str) -> bool:
    return not is_http(uri) and parse_address(uri).is_local


def part_version(version: str, offset: int, length: int) -> str:
    """The version of a part of an object, such as a member of a tar file: that of the whole, and where it lies."""
    return f"{version}-{offset:x}-{length:x}"


def row_version(version: str, row: int) -> str:
    """The version of a row of a Parquet file: that of the file, and which row."""
    return f"{version}-{row:x}"


def _check_unchanged(row: _Ref, version: str) -> None:
    if row["object_version"] not in (None, version):
        message = "the file that holds it has changed since it was listed"
        raise ImageError(message, error_class=RowErrorClass.READ_FAILED)
