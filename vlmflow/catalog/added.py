"""Where the keys are that came into the images table, or moved within it, since a run was planned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.keys import KeyIndex, index_of, to_words
from vlmflow.catalog.log import Snapshot

_MAX_RECENT = 64  # files looked at one by one before they are sorted into the rest


class AddedKeys:
    """Keys of the live files that were not live at planning, 24 bytes each.

    Whatever brought such a file (a run, a replacement, a compaction, even a restore), its keys are looked up here:
    a new image that is here was added by another run, a row to replace that is here has moved to that file.
    """

    def __init__(self, baseline: frozenset[str], read_keys: Callable[[str], pa.Array]) -> None:
        self._baseline = set(baseline)
        self._read_keys = read_keys
        self._paths: list[str] = []  # by number
        self._numbers: dict[str, int] = {}  # of live files
        self._sorted = index_of(pa.array([], pa.binary(16)))
        self._recent: list[KeyIndex] = []
        self._known: dict[str, pa.Array] = {}

    def tell(self, path: str, keys: pa.Array) -> None:
        """Spares the reading of a file's keys, should it become live."""
        self._known[path] = keys

    def skip(self, path: str) -> None:
        """Passes over a file, should it become live: nobody asks for a key of it any more."""
        self._baseline.add(path)

    def refresh(self, snapshot: Snapshot) -> None:
        """Follows the table to a snapshot."""
        gone = self._numbers.keys() - snapshot.files.keys()
        if gone:
            self._forget(gone)
        for path in snapshot.files.keys() - self._baseline - self._numbers.keys():
            keys = self._known.pop(path) if path in self._known else self._read_keys(path)
            number = len(self._paths)
            self._paths.append(path)
            self._numbers[path] = number
            self._recent.append(index_of(keys, number))
        if len(self._recent) > _MAX_RECENT:
            self._sorted = self._sorted.merged(self._recent)
            self._recent = []

    def locate(self, keys: pa.Array) -> npt.NDArray[np.int64]:
        """The number of the live file that holds each key; -1: none of the added files does."""
        high, low = to_words(keys)
        found = self._sorted.find(high, low)
        for index in self._recent:
            found = np.where(found < 0, index.find(high, low), found)
        return found

    def path(self, number: int) -> str:
        """The path of a file, by the number that :meth:`locate` gave."""
        return self._paths[number]

    def _forget(self, gone: set[str]) -> None:
        dead = np.zeros(len(self._paths), dtype=np.bool_)
        for path in gone:
            dead[self._numbers.pop(path)] = True

        def alive(index: KeyIndex) -> npt.NDArray[np.bool_]:
            kept: npt.NDArray[np.bool_] = ~dead[index.values]
            return kept

        self._sorted = self._sorted.kept(alive(self._sorted))
        self._recent = [kept for index in self._recent if len(kept := index.kept(alive(index)))]
