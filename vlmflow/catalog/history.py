"""What the log of a table tells of its versions: who made them, and when."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vlmflow.catalog.folder import Folder
from vlmflow.errors import CatalogError
from vlmflow.threads import Threads

# In the metadata of a commit:
COMMIT_ID = "vlmflow.commit_id"
RUN_ID = "vlmflow.run_id"
REVOKED = "vlmflow.revoked"  # ids of runs that may commit no more, separated by commas

LONG_AGO = dt.datetime.min.replace(tzinfo=dt.UTC)
CLOCKS_DIFFER = dt.timedelta(hours=1)  # by less, of machines that write to one catalog
READ_AT_ONCE = 8  # entries of the log
_LOOKED_AT_ONCE = 4 * READ_AT_ONCE  # on the way back to some time
ENTRY = re.compile(r".*/(\d{20})\.json")


@dataclass(frozen=True)
class Notes:
    """What a commit says of itself."""

    commit_id: str | None
    run_id: str | None
    revoked: frozenset[str]
    at: dt.datetime | None  # by the clock of who made it

    @classmethod
    def of(cls, entry: bytes) -> Notes:
        """Reads an entry of the log, one action a line; one that another program made may say nothing."""
        actions = (json.loads(line) for line in entry.splitlines() if b'"commitInfo"' in line)
        info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
        runs = str(info.get(REVOKED) or "")
        ms = info.get("timestamp")
        at = dt.datetime.fromtimestamp(ms / 1000, dt.UTC) if isinstance(ms, int) else None
        return cls(info.get(COMMIT_ID), info.get(RUN_ID), frozenset(runs.split(",")) if runs else frozenset(), at)


def forgotten(folder: Folder, table: str, version: int) -> CatalogError:
    """What is said of a version that the log does not hold any more."""
    return CatalogError(
        f"{folder.config.uri}: the log of table {table} does not go back to version {version} any more",
        remedy="Begin anew, with all rows: since version 0.",
    )


def _are_before(time: dt.datetime, times: Iterable[dt.datetime | None]) -> bool:
    return all(at is not None and time - at > CLOCKS_DIFFER for at in times)


class History:
    """The entries of one table's log, each read once: they never change."""

    def __init__(self, folder: Folder, table: str) -> None:
        self._folder = folder
        self._table = table
        self._notes: dict[int, Notes] = {}  # by version

    def after(self, since: int, newest: int) -> list[Notes]:
        """The notes of all versions after ``since``, up to ``newest``.

        Raises:
            CatalogError: the log does not go back so far any more.
        """
        return self._read(range(since + 1, newest + 1))

    def first_commit_of(self, run_id: str, started_at: dt.datetime, newest: int) -> int | None:
        """The first version of those in the log, up to ``newest``, that a run made; None: none.

        Args:
            started_at: of the run: entries that are older by more than clocks differ are not read.
        """
        there = self._there(newest)

        def is_over(_: Sequence[int], found: Sequence[Notes]) -> bool:
            return _are_before(started_at, (notes.at for notes in found))

        numbers = [number for number, notes in self._back(sorted(there), is_over) if notes.run_id == run_id]
        return min(numbers, default=None)

    def version_before(self, time: dt.datetime, newest: int) -> int:
        """The newest version before the first one that was made after a time.

        Clocks of machines differ, and are set right or wrong: a later version may say an earlier time. What was made
        after the time, by what any version says, is never left out; nor what says an earlier time than one before it,
        by more than clocks differ, unless a version after it shows that it was made in time. Where no version tells
        that a clock was wrong, the store may: by when it was given the entries.

        Raises:
            CatalogError: the log does not go back so far any more.
        """
        there = self._there(newest)
        given = dict(zip(sorted(there), accumulate((there[number] for number in sorted(there)), max), strict=True))

        def is_late(number: int) -> bool:  # it was put there by a clock that was behind
            return given[number] - there[number] > CLOCKS_DIFFER

        def is_over(some: Sequence[int], found: Sequence[Notes]) -> bool:
            are_before = _are_before(time, (given[some[-1]], *(notes.at for notes in found)))
            return are_before and not all(map(is_late, some))

        first = newest + 1
        read = dict(self._back(sorted(there), is_over))
        told, in_doubt = LONG_AGO, set()
        for number in sorted(read):
            at = read[number].at
            if at is None or told - at > CLOCKS_DIFFER or is_late(number):
                in_doubt.add(number)
            told = max(told, at or told)
        was_before = False  # a version after this one was made in time, and so was this one
        for number in sorted(read, reverse=True):
            at = read[number].at
            if (at is not None and at > time) or (number in in_doubt and not was_before):
                first = number
            was_before |= number not in in_doubt and at is not None and at <= time
        if first == 0:  # the table was made empty
            return 0
        if first <= newest and not self.holds(first - 1):
            raise forgotten(self._folder, self._table, first - 1)
        return first - 1

    def earliest(self, since: int, newest: int) -> dt.datetime | None:
        """The earliest time that a version says of those from one to another; None: the log does not say of each."""
        if not all(self.holds(number) for number in range(since, newest + 1)):
            return None
        times = [notes.at for notes in self._read(range(since, newest + 1))]
        known = [at for at in times if at is not None]
        return min(known) if len(known) == len(times) else None

    def made_at(self, version: int) -> dt.datetime | None:
        """When a version was made, by the clock of who made it; None: the log does not say, or not any more."""
        return self._read([version])[0].at if self.holds(version) else None

    def holds(self, version: int) -> bool:
        """Whether the entry of a version is there; those older than 30 days are forgotten at a checkpoint."""
        return version in self._notes or self._folder.stat(self._path(version)) is not None

    def _there(self, newest: int) -> dict[int, dt.datetime]:
        """The versions of those in the log, up to ``newest``, with when the store was given their entries."""
        found = (
            (ENTRY.fullmatch(file.path), file.modified_at) for file in self._folder.list(f"{self._table}/_delta_log")
        )
        return {int(name[1]): at for name, at in found if name and int(name[1]) <= newest}

    def _back(
        self, there: Sequence[int], is_over: Callable[[Sequence[int], Sequence[Notes]], bool]
    ) -> Iterator[tuple[int, Notes]]:
        """Versions, given in order, from the newest back until by some of them it is over."""
        while there:
            there, some = there[:-_LOOKED_AT_ONCE], there[-_LOOKED_AT_ONCE:]
            found = self._read(some)
            yield from zip(some, found, strict=True)
            # All of them: one may be of a machine whose clock is wrong.
            if is_over(some, found):
                return

    def _read(self, numbers: Sequence[int]) -> list[Notes]:
        """Reads what commits say of themselves: a run asks before each of its commits.

        Each by its name: ``DeltaTable.history`` begins with the newest entry of the log, which others may have made
        a moment ago, and calls it the version that the handle is at.
        """
        unread = [number for number in numbers if number not in self._notes]
        if unread:
            with Threads(READ_AT_ONCE) as pool:
                self._notes.update(zip(unread, pool.map(self._of, unread), strict=True))
        return [self._notes[number] for number in numbers]

    def _of(self, number: int) -> Notes:
        entry = self._folder.read(self._path(number))
        if entry is None:
            raise CatalogError(
                f"{self._folder.config.uri}: the log of table {self._table} does not hold version {number} any more, "
                "so it cannot be told whether the change was made before, or its run revoked",
                remedy="Run the same command again: it begins at the newest version.",
            )
        return Notes.of(entry)

    def _path(self, number: int) -> str:
        return f"{self._table}/_delta_log/{number:020d}.json"
