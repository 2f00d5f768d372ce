"""A Delta table of the catalog: opening, creating, and what its newest version holds."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.history import CLOCKS_DIFFER, ENTRY, READ_AT_ONCE, History, forgotten
from vlmflow.catalog.on_disk import check_log, may_be_absent
from vlmflow.catalog.protocol import check_partitions, check_readable, check_writable, remedy_of
from vlmflow.errors import (
    CatalogError,
    StorageAccessError,
    StoreLostError,
    TransientError,
    UnsupportedTableError,
    VlmflowError,
)
from vlmflow.retry import retried
from vlmflow.storage import Fault, access_error, fault_of, is_full, is_of_store, text_of
from vlmflow.threads import Threads

TableName: TypeAlias = Literal["images", "embeddings"]
Answer = TypeVar("Answer")

APPLICATION_ID = "vlmflow"  # shared by all writers: each commit takes its next number
_DELTA_ERRORS = (DeltaError, OSError)
_LONGEST_REASON = 300  # characters of deltalake's, which may show what it holds
_ABSOLUTE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*:/")  # a path of the log that is not below the table

LONGEST_RETENTION = dt.timedelta(days=30)  # of files of old versions
SCHEMA_VERSION = "5"  # of IMAGES and EMBEDDINGS; raised together with a migration
UPGRADABLE = ("2", "3", "4")  # older ones, which lack columns and nothing else: see catalog/upgrade.py
_SCHEMA_VERSION_KEY = "vlmflow.schemaVersion"

# What the log says of each file beside its number of rows: ids, dates (the partition) and numbers, never a text,
# because the log outlives the files and a text may be somebody's.
STATS_COLUMNS: dict[TableName, tuple[str, ...]] = {
    "images": ("image_id", "size_bytes", "width", "height", "attempts"),
    "embeddings": ("image_id",),
}


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table."""

    path: str  # relative to the table
    size_bytes: int
    num_rows: int
    ingest_date: dt.date
    stats: str = ""  # JSON for the log; empty for a file read from it


@dataclass(frozen=True)
class Snapshot:
    """One version of a table."""

    version: int
    number: int  # last number taken under the shared application id; 0: none yet
    files: dict[str, DataFile]  # live ones, by path
    schema: pa.Schema


class TableLog:
    """A handle on one table, moved to its newest version before each use. Driver only: it must not cross a fork.

    Threads may share it for reading alone: who commits needs one that nobody else moves; see :meth:`from_now`.

    Attributes:
        opened_at: the version that was the newest when it was opened. It is to be opened before a run begins that
            commits through it: so no earlier version has revoked that run.
    """

    def __init__(self, folder: Folder, name: TableName, table: DeltaTable) -> None:
        self.folder = folder
        self.name: TableName = name
        self.table = table
        self.opened_at: int = table.version()
        self.history = History(folder, name)

    @classmethod
    def open(cls, folder: Folder, name: TableName) -> TableLog:
        """Opens the table.

        Raises:
            CatalogError: there is none, it cannot be read, or another version of vlmflow wrote it;
                UnsupportedTableError: another program has made of it what vlmflow cannot read.
            StorageAccessError: the store refuses, or is gone.
            TransientError: the store is out of reach.
        """
        check_log(folder, name)
        try:
            table = retried(
                lambda: DeltaTable(folder.table_uri(name), storage_options=folder.storage_options),
                _DELTA_ERRORS,
                never=(TableNotFoundError,),
            )
        except TableNotFoundError as error:
            may_be_absent(folder, name)
            raise CatalogError(
                f"no catalog at {folder.config.uri}: its table {name} is absent",
                remedy="Check the address, or create the catalog with `vlmflow enrich`.",
            ) from error
        except (*_DELTA_ERRORS, ValueError) as error:
            folder.check_access()
            raise unusable(folder, name, "cannot be read", error) from error
        found = table.metadata().configuration.get(_SCHEMA_VERSION_KEY)
        if found not in (SCHEMA_VERSION, *UPGRADABLE):
            raise CatalogError(
                f"{folder.config.uri}: table {name} has schema version {found}, not {SCHEMA_VERSION} as here",
                remedy="Use the vlmflow release that wrote the catalog, or write to a new one.",
            )
        log = cls(folder, name, table)
        log._check_readable()
        return log

    def from_now(self) -> TableLog:
        """A handle of its own on the same table, opened now: for a run that begins long after this one was.

        The log does not go back for ever. And this handle may be moved by another thread at any moment: a commit
        through it would be made from a version that it was not decided on.

        Raises:
            CatalogError, StorageAccessError, TransientError: as :meth:`open`.
        """
        log = TableLog.open(self.folder, self.name)
        log.history = self.history  # of versions that do not change: what was read is not read again
        return log

    @property
    def schema_version(self) -> str | None:
        """The version of the table's columns, as the handle sees it."""
        return self.table.metadata().configuration.get(_SCHEMA_VERSION_KEY)

    def set_schema_version(self) -> None:
        """Marks the table as one of this version's columns.

        Raises:
            StorageAccessError: the store refuses to be written to.
        """

        def mark() -> None:
            table = self.refreshed_table()  # anew each time: another program may have been first
            if self.schema_version != SCHEMA_VERSION:
                # In a property of our own deltalake sees nothing that it knows.
                table.alter.set_table_properties({_SCHEMA_VERSION_KEY: SCHEMA_VERSION}, raise_if_not_exists=False)

        _answered(self.folder, self.name, mark)

    @classmethod
    def exists(cls, folder: Folder, name: TableName) -> bool:
        """Whether the table is there.

        Raises:
            StorageAccessError, TransientError: as :meth:`refreshed_table`.
        """
        uri, options = folder.table_uri(name), folder.storage_options
        if _answered(folder, name, lambda: DeltaTable.is_deltatable(uri, storage_options=options)):
            return True
        may_be_absent(folder, name)
        return False

    @classmethod
    def open_or_create(cls, folder: Folder, name: TableName, columns: pa.Schema) -> TableLog:
        """Opens the table, created first if it is absent. Several runs may do so at once.

        Raises:
            CatalogError: it cannot be created.
            StoreLostError: the disk is full.
        """

        def create_once() -> None:
            if not cls.exists(folder, name):  # else another run has just created it
                _create(folder, name, columns)

        try:
            retried(create_once, _DELTA_ERRORS)
        except (DeltaError, OSError) as error:
            if not cls.exists(folder, name):
                raise unusable(folder, name, "cannot be created", error) from error
        return cls.open(folder, name)

    def refreshed_table(self) -> DeltaTable:
        """The handle, at the newest version.

        Raises:
            StorageAccessError: the store refuses, or is gone.
            TransientError: the store is out of reach.
        """
        _answered(self.folder, self.name, self.table.update_incremental)
        return self.table

    def refresh(self) -> Snapshot:
        """Moves to the newest version and reads it.

        Raises:
            UnsupportedTableError: another program has made of the table what vlmflow cannot read.
            StorageAccessError, TransientError: as :meth:`refreshed_table`.
        """
        table = self.refreshed_table()
        self._check_readable()

        def read() -> Snapshot:
            return Snapshot(
                version=table.version(),
                number=table.transaction_version(APPLICATION_ID) or 0,
                files=_live_files(self.folder.config.uri, self.name, table),
                schema=pa.schema(table.schema().to_arrow()),
            )

        return _answered(self.folder, self.name, read)

    def _check_readable(self) -> None:
        uri, is_current = self.folder.config.uri, self.schema_version == SCHEMA_VERSION
        _answered(self.folder, self.name, lambda: check_readable(uri, self.name, self.table, is_current=is_current))

    def check_writable(self) -> None:
        """Makes sure that what vlmflow commits keeps what the table promises, as the handle sees it.

        Raises:
            UnsupportedTableError: it does not, or cannot be committed.
        """
        check_writable(self.folder.config.uri, self.name, self.table)

    def was_committed(self, commit_id: str, since: int) -> bool:
        """Whether a version after ``since``, up to the one that the handle is at, was made by this commit.

        Raises:
            CatalogError: the log does not go back so far any more.
        """
        return any(notes.commit_id == commit_id for notes in self.history.after(since, self.table.version()))

    def revoked(self, since: int) -> frozenset[str]:
        """The runs that were revoked after version ``since``, up to the one that the handle is at.

        Raises:
            CatalogError: the log does not go back so far any more.
        """
        return frozenset[str]().union(*(notes.revoked for notes in self.history.after(since, self.table.version())))

    def first_commit_of(self, run_id: str, started_at: dt.datetime) -> int | None:
        """As :meth:`History.first_commit_of`, up to the version that the handle is at."""
        return self.history.first_commit_of(run_id, started_at, self.table.version())

    def delete_leftovers(self, paths: Sequence[str]) -> None:
        """Removes what a commit has left out; never a file that the table holds, whatever was made of the commit.

        Args:
            paths: relative to the catalog.
        """
        if paths:
            live = {f"{self.name}/{path}" for path in self.refresh().files}
            self.folder.delete_all([path for path in paths if path not in live])

    def removed_files(self, age: dt.timedelta) -> frozenset[str]:
        """The paths of files that were live once and that the log says were removed at least so long ago.

        Raises:
            StorageAccessError, TransientError: as :meth:`refreshed_table`.
        """
        hours = -(-age // dt.timedelta(hours=1))  # whole ones, rounded up: rather kept than lost
        table = self.refreshed_table()
        found = _answered(
            self.folder,
            self.name,
            lambda: table.vacuum(retention_hours=hours, dry_run=True, enforce_retention_duration=False),
        )
        return frozenset(unquote(path) for path in found)

    def removed_lately(self, now: dt.datetime) -> frozenset[str]:
        """The paths of files that commits of the last hours have removed, whatever the time that they say.

        :meth:`removed_files` goes by the clocks of who removed them and of this machine, and passes over what seems to
        lie in the future.

        Args:
            now: by the store's clock.
        """
        since = now - 2 * CLOCKS_DIFFER
        there = list(self.folder.list(f"{self.name}/_delta_log"))
        late = [file.path for file in there if ENTRY.fullmatch(file.path) and file.modified_at > since]
        with Threads(READ_AT_ONCE) as pool:
            entries = b"\n".join(entry or b"" for entry in pool.map(self.folder.read, late))
        actions = (json.loads(line) for line in entries.splitlines() if b'"remove"' in line)
        return frozenset(unquote(action["remove"]["path"]) for action in actions if "remove" in action)

    @property
    def table_id(self) -> str:
        """What tells this table from another that is made later in its place."""
        return str(self.table.metadata().id)

    def files_at(self, version: int) -> dict[str, DataFile]:
        """The files that were live at an earlier version, by path. Tables are made empty, as version 0.

        Raises:
            CatalogError: the log does not go back so far any more.
            StorageAccessError, TransientError: as :meth:`refreshed_table`.
        """
        if version <= 0:
            return {}
        place, uri, options = self.folder.config.uri, self.folder.table_uri(self.name), self.folder.storage_options

        def files() -> dict[str, DataFile]:
            return _live_files(place, self.name, DeltaTable(uri, version, storage_options=options))

        try:
            return _answered(self.folder, self.name, files)
        except (UnsupportedTableError, StoreLostError):
            raise
        except (CatalogError, StorageAccessError, TransientError) as error:
            if self.history.holds(version):
                raise
            raise forgotten(self.folder, self.name, version) from error


def file_stats(name: TableName, rows: pa.Table) -> str:
    """The statistics that the log keeps of a file with these rows, as JSON."""
    lowest: dict[str, object] = {}
    highest: dict[str, object] = {}
    nulls: dict[str, int] = {}
    for column in STATS_COLUMNS[name]:
        values = rows[column]
        nulls[column] = values.null_count
        if values.null_count < len(values):
            bounds = pa.compute.min_max(values).as_py()
            lowest[column], highest[column] = bounds["min"], bounds["max"]
    return json.dumps(
        {"numRecords": rows.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls},
        separators=(",", ":"),
    )


def _answered(folder: Folder, name: TableName, ask: Callable[[], Answer]) -> Answer:
    """What deltalake answers; where the store or the table does not let it, that is said in our words."""
    try:
        return retried(ask, _DELTA_ERRORS)
    except (*_DELTA_ERRORS, ValueError) as error:  # Arrow's, of what deltalake makes of the log
        folder.check_access()
        if is_of_store(error):
            raise access_error(error, folder.config.uri) from error
        raise unusable(folder, name, "cannot be read", error) from error


def _create(folder: Folder, name: TableName, columns: pa.Schema) -> None:
    DeltaTable.create(
        folder.table_uri(name),
        columns,
        partition_by=["ingest_date"],
        name=f"vlmflow {name}",
        configuration={
            _SCHEMA_VERSION_KEY: SCHEMA_VERSION,
            "delta.dataSkippingStatsColumns": ",".join(STATS_COLUMNS[name]),
            # How long the log remembers a removed file: vacuum tells such a file from an orphan by it.
            "delta.deletedFileRetentionDuration": f"interval {LONGEST_RETENTION.days} days",
        },
        storage_options=folder.storage_options,
        raise_if_key_not_exists=False,
    )


def unusable(folder: Folder, name: TableName, what: str, error: Exception) -> VlmflowError:
    """The error for a table with which deltalake cannot do something."""
    if is_full(error) or fault_of(error) is Fault.DENIED:
        return access_error(error, folder.config.uri)
    reason = text_of(error).splitlines()[0][:_LONGEST_REASON] if str(error) else type(error).__name__
    told = f"{folder.config.uri}: table {name} {what}: {reason}"
    remedy = None if is_of_store(error) else remedy_of(reason)
    if remedy is not None:
        return UnsupportedTableError(told, remedy=remedy)
    doctor = "Check the address and that the place may be written to; `vlmflow doctor` tries it."
    return CatalogError(told, remedy=doctor)


def _live_files(uri: str, name: TableName, table: DeltaTable) -> dict[str, DataFile]:
    check_partitions(uri, name, table)
    actions = pa.table(table.get_add_actions(flatten=True))
    columns: Sequence[str] = ("path", "size_bytes", "num_records", "partition.ingest_date")
    rows = zip(*(actions[column].to_pylist() for column in columns), strict=True)
    # Another program's file may come without a count; it only serves to share out work. Its path is that of a uri.
    files = {unquote(path): DataFile(unquote(path), size, count or 0, date) for path, size, count, date in rows}
    if elsewhere := next(filter(_ABSOLUTE.match, files), None):
        raise UnsupportedTableError(
            f"{uri}: table {name} has files outside its folder, as a shallow clone does: {elsewhere}",
            remedy="Have another program copy them into it (a deep clone), or use the catalog that they belong to.",
        )
    return files
