"""Delta tables of the caller's: as a manifest, or as Parquet files of image bytes.

A folder of one holds the files of older versions too; the log alone says which of them count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import unquote

import obstore
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from vlmflow.config import SourceConfig
from vlmflow.delta_table import delta_storage_options, delta_uri
from vlmflow.errors import SourceError, VlmflowError
from vlmflow.paths import is_folder
from vlmflow.retry import retried
from vlmflow.sources.stores import Stores
from vlmflow.sources.tables import portable_schema, portable_type, to_portable
from vlmflow.storage import STORE_ERRORS, access_error, is_full, is_of_store, parse_address, text_of
from vlmflow.threads import interruptible

_LOG = "_delta_log"
_ENTRY = re.compile(r"(.*/)?\d{20}\.(json|checkpoint\..*)")
_ERRORS = (DeltaError, *STORE_ERRORS)
# A path of the log that is not below the table.
_ELSEWHERE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*:/|(.*/)?\.\.(/|\Z)", re.DOTALL)
_FIRST_NAMES = 100  # of a log: its entries come before most else that lies there
_LONGEST_REASON = 300  # characters of deltalake's
_OTHERWISE = "Write its rows to Parquet files, and name their folder with source.kind manifest or parquet."


def is_delta_table(config: SourceConfig, stores: Stores) -> bool:
    """Whether a Delta table lies at the source's uri: nothing but its log is looked for.

    Raises:
        StorageAccessError: the store refused, or is not there.
        TransientError: the store is out of reach.
    """
    address = parse_address(config.uri)
    try:
        if address.is_local:
            log = Path(address.path) / _LOG
            names = [path.name for path in log.iterdir()] if is_folder(log) else []
        else:
            store, prefix = stores.locate(config.uri)
            below = f"{prefix}/{_LOG}" if prefix else _LOG
            first = retried(lambda: next(iter(obstore.list(store, below, chunk_size=_FIRST_NAMES)), []))
            names = [found["path"] for found in first]
        return any(_ENTRY.fullmatch(name) for name in names)
    except STORE_ERRORS as error:
        raise access_error(error, config.uri) from error


class DeltaManifest:
    """The rows of a Delta table in the version that is there when it is opened; in no order.

    Deletion vectors and column mapping are heeded, with which Databricks makes its tables.

    Args:
        is_needed: says it of a column by its name; the values of others are not read, and one that has no portable type
            is not in the schema either.
    """

    def __init__(self, config: SourceConfig, is_needed: Callable[[str], bool]) -> None:
        self._config, self._is_needed = config, is_needed

    @cached_property
    def _opened(self) -> DeltaTable:
        return open_delta(self._config)

    @cached_property
    def schema(self) -> pa.Schema:
        """Its columns; see :class:`vlmflow.sources.tables.TableFile`."""
        fields = [
            field
            for field in pa.schema(self._opened.schema().to_arrow())
            if self._is_needed(field.name) or portable_type(field.type) is not None
        ]
        return portable_schema(pa.schema(fields), self._config.uri)

    def batches(self) -> Iterator[pa.Table]:
        """Yields its rows, with the columns that somebody needs."""
        needed = pa.schema([field for field in self.schema if self._is_needed(field.name)])
        try:
            rows = pa.RecordBatchReader.from_stream(self._opened.scan(columns=needed.names))
            while (batch := interruptible(partial(next, rows, None))) is not None:
                yield to_portable(pa.table(batch), needed, self._config.uri)
        except (*_ERRORS, pa.ArrowException) as error:
            raise _unreadable(error, self._config.uri) from error


def open_delta(config: SourceConfig) -> DeltaTable:
    """Opens the newest version.

    Raises:
        ConfigError: deltalake opens no table in a folder of that name.
        SourceError: it cannot be read.
        StorageAccessError: the store refused, or is not there.
        TransientError: the store is out of reach.
    """
    uri, options = delta_uri(parse_address(config.uri)), delta_storage_options(config.storage, config.uri)
    try:
        return retried(lambda: DeltaTable(uri, storage_options=options), _ERRORS, never=(TableNotFoundError,))
    except _ERRORS as error:
        raise _unreadable(error, config.uri) from error


def delta_files(config: SourceConfig) -> Sequence[str]:
    """The uris of the files that hold the rows of the newest version, each with all its rows.

    Raises:
        SourceError: besides what :func:`open_delta` raises, its files hold rows that are deleted, or columns under
            other names, or lie elsewhere.
    """
    table, address = open_delta(config), parse_address(config.uri)
    mode = table.metadata().configuration.get("delta.columnMapping.mode") or "none"
    if mode != "none":
        raise SourceError(f"{address}: its files may call columns otherwise (column mapping)", remedy=_OTHERWISE)
    if any(batch.num_rows for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors())):
        remedy = "Have them removed from its files (REORG TABLE ... APPLY (PURGE)); then run again."
        raise SourceError(f"{address}: its files hold rows that are deleted (deletion vectors)", remedy=remedy)
    paths = [unquote(path) for path in pa.table(table.get_add_actions(flatten=True))["path"].to_pylist()]
    if elsewhere := next(filter(_ELSEWHERE.match, paths), None):
        raise SourceError(
            f"{address}: files lie outside its folder, as those of a shallow clone: {elsewhere}", remedy=_OTHERWISE
        )
    return sorted(address.child(path) for path in paths)


def _unreadable(error: Exception, uri: str) -> VlmflowError:
    """The error for a table with which deltalake cannot do something."""
    if is_full(error) or is_of_store(error):
        return access_error(error, uri)
    reason = text_of(error).splitlines()[0][:_LONGEST_REASON] if str(error) else type(error).__name__
    return SourceError(f"{uri} is a Delta table that cannot be read: {reason}", remedy=_OTHERWISE)
