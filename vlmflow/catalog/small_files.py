"""Small Parquet files of one kind, which are added and never changed, and of which many become one in the end."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pyarrow as pa

from vlmflow.catalog.columns import conform
from vlmflow.catalog.file_info import FileInfo
from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError
from vlmflow.threads import Threads

_AT_ONCE = 16  # files that are read at a time
_TRIES = 10  # of reading them, beside those who remove some
# So many files with fewer rows are put into one, up to so many at a time.
_MANY, _SMALL_ROWS, _MOST = 64, 10_000, 5_000
_SETTLED = dt.timedelta(minutes=10)  # no listing takes longer, and clocks of stores differ by less
# In the metadata of such a file: the paths of those that it was made of. `vlmflow.verdicts_of`, of older ones, is not
# read: copies made by an erasure kept it, though they no longer held all that these files did.
_SOURCES = b"vlmflow.made_of"

Held: TypeAlias = Mapping[str, tuple[FileInfo, pa.Table]]  # files by path, and what they hold


class SmallFiles:
    """The files of one folder; what was read of them stays in memory.

    Many are joined in two steps: one is written that holds what they hold, and a while later they are removed. Not at
    once: whoever is listing the folder meanwhile may miss the new file, and must find those that it was made of. Who
    is killed in between leaves rows twice, which have to count for once.

    Args:
        below: the folder in the catalog.
        columns: of the files; older ones may lack some.
    """

    def __init__(self, folder: Folder, below: str, columns: pa.Schema) -> None:
        self._folder, self._below, self._columns = folder, below, columns
        # By path: a file never changes. Threads share them: they are put in place whole.
        self._read: dict[str, pa.Table] = {}
        self._sources: dict[str, frozenset[str]] = {}  # by path of one that holds what others did: their paths

    def add(self, name: str, rows: pa.Table) -> str:
        """Puts a file in place, unless there is one of that name; returns its path."""
        path = f"{self._below}/{name}.parquet"
        if self._folder.stat(path) is None:
            self._folder.write_parquet(path, rows)
        self._read = self._read | {path: rows}
        return path

    def look(self) -> Held:
        """The files that are there now."""
        for attempt in range(1, _TRIES + 1):
            held, sources = self._read, self._sources  # once: another thread may put what it has listed in their place
            listed = {file.path: file for file in self._folder.list(self._below) if file.path.endswith(".parquet")}
            new = sorted(listed.keys() - held.keys())
            try:
                with Threads(_AT_ONCE) as pool:
                    tables = dict(zip(new, pool.map(self._folder.read_parquet, new), strict=True))
            except CatalogError:
                # One that is gone was joined, or written anew by an erasure: in another, which may not be listed here.
                if attempt == _TRIES or all(self._folder.stat(path) is not None for path in new):
                    raise
                continue
            sources = sources | {path: _sources_of(rows) for path, rows in tables.items()}
            held = held | {path: self._conformed(path, rows) for path, rows in tables.items()}
            self._sources = {path: sources.get(path, frozenset()) for path in listed}
            self._read = {path: held[path] for path in listed}
            return {path: (listed[path], held[path]) for path in sorted(listed)}
        raise AssertionError("unreachable")

    def _conformed(self, path: str, rows: pa.Table) -> pa.Table:
        needed = self._columns.names[0]  # older files lack later ones
        if needed not in rows.column_names:
            raise CatalogError(
                f"{self._folder.config.uri}: {path} has no column {needed}: vlmflow did not write it",
                remedy="Take it out of there: what lies in this folder counts.",
            )
        return conform(rows, self._columns)

    @property
    def joined(self) -> frozenset[str]:
        """Files whose rows stand in another too, of those that were read: they may go, and nothing is lost."""
        return frozenset().union(*self._sources.values())

    def to_join(self, files: Held) -> list[str]:
        """The paths of those that are worth joining now; none while they are few."""
        done = self.joined
        small = [path for path, (_, rows) in files.items() if rows.num_rows < _SMALL_ROWS and path not in done]
        return small[:_MOST] if len(small) >= _MANY else []

    def join(self, paths: Sequence[str], rows: pa.Table) -> str:
        """Puts the file in place that holds what these hold; returns its path."""
        path = f"{self._below}/{uuid.uuid4().hex}.parquet"
        self._folder.write_parquet(path, rows.replace_schema_metadata({_SOURCES: json.dumps(list(paths))}))
        return path

    def remove_joined(self, files: Held, now: dt.datetime) -> None:
        """Removes those of which one was made a while ago.

        Args:
            now: by the store's clock.
        """
        since = now - _SETTLED
        settled = (self._sources.get(path, ()) for path, (file, _) in files.items() if file.modified_at < since)
        self._folder.delete_all(sorted(files.keys() & frozenset().union(*settled)))


def _sources_of(rows: pa.Table) -> frozenset[str]:
    """The files that a file was made of; none of most."""
    return frozenset(json.loads((rows.schema.metadata or {}).get(_SOURCES, b"[]")))
