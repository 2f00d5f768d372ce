"""Which images were erased and must not come back: an id and a time each, nothing else."""

from __future__ import annotations

import datetime as dt
import secrets

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, concat, index_of

TOMBSTONES = "tombstones"

# One row per image and erasure, or its lifting. Files are added and never changed.
_EVENT = pa.schema([("image_id", schema.KEY), ("at", schema.TIMESTAMP), ("lifted", pa.bool_())])


class Tombstones:
    """Reads and adds tombstones. What was read is remembered: a run asks before each of its commits."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: dict[str, pa.Table] = {}
        self._keys: pa.Array | None = None
        self._index: KeyIndex | None = None

    def put(self, keys: pa.Array, *, lifted: bool = False) -> None:
        """Erases images for the time to come, or lets them come back."""
        now = dt.datetime.now(dt.UTC)
        count = len(keys)
        columns = [keys, pa.repeat(pa.scalar(now, schema.TIMESTAMP), count), pa.repeat(pa.scalar(lifted), count)]
        name = f"{now:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}.parquet"
        self._folder.write_parquet(f"{TOMBSTONES}/{name}", pa.table(columns, schema=_EVENT))

    def keys(self) -> pa.Array:
        """The images that are erased now, sorted by nothing."""
        self._refresh()
        assert self._keys is not None
        return self._keys

    def index(self) -> KeyIndex:
        """The same, to look keys up."""
        self._refresh()
        assert self._index is not None
        return self._index

    def _refresh(self) -> None:
        names = {file.path for file in self._folder.list(TOMBSTONES)}
        fresh = names - self._files.keys()
        if not fresh and self._index is not None:
            return
        for name in fresh:
            self._files[name] = self._folder.read_parquet(name)
        self._keys = _erased(pa.concat_tables([_EVENT.empty_table(), *self._files.values()]))
        self._index = index_of(self._keys)


def _erased(events: pa.Table) -> pa.Array:
    """The images whose newest event is an erasure."""
    events = events.sort_by([("at", "descending")])
    position = pa.array(np.arange(events.num_rows))
    newest = events.append_column("position", position).group_by("image_id").aggregate([("position", "min")])
    last = events.take(newest["position_min"])
    return concat([last.filter(pc.invert(last["lifted"]))["image_id"]])
