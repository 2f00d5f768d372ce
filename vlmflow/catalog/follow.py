"""Following a catalog: what has changed since a version or a time, for one reader after the other to take over."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from vlmflow.catalog.changes import ChangeCounts, Changes
from vlmflow.catalog.export import write_tables
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import index_of
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.read import embedding_batches, of_one_time
from vlmflow.catalog.tombstones import Tombstones
from vlmflow.errors import CatalogError, ConfigError

# An erasure puts its tombstones before it rewrites files, and commits after: by less than so much, clocks included.
_LONGEST_ERASURE = dt.timedelta(days=1)

Since: TypeAlias = int | dt.datetime


@dataclass(frozen=True)
class Bookmark:
    """How far a reader has followed a catalog: a version of one images table."""

    table_id: str  # of the table; another catalog at the same address has another
    version: int

    @classmethod
    def read(cls, path: Path) -> Bookmark | None:
        """Reads what :meth:`as_json` wrote; None: there is no such file.

        Raises:
            ConfigError: the file is something else.
        """
        try:
            held: Any = json.loads(path.read_text("utf-8"))
            return cls(str(held["table_id"]), int(held["version"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no bookmark"
            remedy = "Name a file that `vlmflow changes` wrote, or one that does not exist: then all rows are new."
            raise ConfigError(f"{path} cannot be read: {reason}", remedy=remedy) from error

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"table_id": self.table_id, "version": self.version}) + "\n"


@dataclass(frozen=True)
class ChangesResult:
    """What a reader is told.

    Attributes:
        since, version: of the images table: what came after the one, up to the other.
        since_at, version_at: when these were made, by the clock of who made them; None: the log does not say.
        bookmark: to go on from here.
        counts: of rows.
        num_vectors: vectors that were written; None: none were asked for.
    """

    since: int
    version: int
    since_at: dt.datetime | None
    version_at: dt.datetime | None
    bookmark: Bookmark
    counts: ChangeCounts
    num_vectors: int | None


class ChangeFeed:
    """What has changed between two versions of a catalog's images table; read it once.

    Attributes:
        since, version: these versions.
        bookmark: to go on from ``version``.
        counts: of the rows read so far.
    """

    def __init__(
        self,
        folder: Folder,
        logs: tuple[TableLog, TableLog],
        tombstones: Tombstones,
        since: Since | Bookmark,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._folder = folder
        self._images, embeddings = logs
        self._now, self._vectors = of_one_time(self._images, embeddings)
        self.version = self._now.version
        self.bookmark = Bookmark(self._images.table_id, self.version)
        self.since = self._version_of(since)

        def erased() -> pa.Array:
            # Not by the one version alone: its clock may have been ahead, and have been set right before an erasure.
            at = self._images.history.earliest(self.since, self.version)
            return tombstones.since(None if at is None else at - _LONGEST_ERASURE)

        self._changes = Changes(folder, self._images.files_at(self.since), self._now, columns, erased)
        self.counts = self._changes.counts

    def tables(self) -> Iterator[pa.Table]:
        """The rows; see :meth:`vlmflow.catalog.changes.Changes.tables`."""
        return self._changes.tables()

    def vectors(self) -> Iterator[pa.Table]:
        """The vectors of those rows of :meth:`tables` that have others than they had.

        Raises:
            ValueError: :meth:`tables` has not been read to its end, so some would be missing.
        """
        if not self._changes.is_read:
            raise ValueError("read tables() of the changes to its end before vectors(): it finds which are new")
        keys = self._changes.new_vectors
        yield from embedding_batches(self._folder, self._now, self._vectors, of=index_of(keys))

    def write(self, target: Path | None, *, with_embeddings: bool = False) -> ChangesResult:
        """Reads all of it, and writes it as :meth:`Catalog.export` does; None: nowhere, to count it.

        Raises:
            CatalogError: ``target`` holds something else or cannot be written; CatalogChangedError: an erasure came
                in between.
            ConfigError: ``target`` is in a store, or named like a file.
        """
        num_vectors = None
        if target is None:
            for _ in self.tables():
                pass
        else:
            written = write_tables(target, self.version, self.tables(), self.vectors() if with_embeddings else None)
            num_vectors = written.num_embeddings if with_embeddings else None
        made_at = self._images.history.made_at
        times = made_at(self.since), made_at(self.version)
        return ChangesResult(self.since, self.version, *times, self.bookmark, self.counts, num_vectors)

    def _version_of(self, since: Since | Bookmark) -> int:
        if isinstance(since, dt.datetime):
            since = since if since.tzinfo else since.replace(tzinfo=dt.UTC)
            return self._images.history.version_before(since, self.version)
        uri = self._folder.config.uri
        if isinstance(since, Bookmark):
            if since.table_id != self.bookmark.table_id:
                remedy = "Begin anew, with all rows: since version 0, or with a new bookmark."
                raise CatalogError(f"the bookmark is not of the catalog that is at {uri} now", remedy=remedy)
            since = since.version
        if not 0 <= since <= self.version:
            remedy = f"Give a number from 0, for all rows, to {self.version}."
            raise ConfigError(f"{uri} has no version {since}: the newest is {self.version}", remedy=remedy)
        return since
