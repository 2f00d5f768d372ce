"""Which rows of a catalog a remoderation is asked for."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from vlmflow.catalog.log import DataFile
from vlmflow.errors import ConfigError


@dataclass(frozen=True)
class Scope:
    """Which rows are asked for: ingest dates from ``start`` to ``end``, both included, and a condition in SQL.

    Raises:
        ConfigError: the first date is later than the last.
    """

    start: dt.date | None = None
    end: dt.date | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        """Refuses a range that no date lies in, of which everything would seem to be done."""
        if self.start is not None and self.end is not None and self.start > self.end:
            remedy = "Give the earlier date first."
            raise ConfigError(f"no ingest date is from {self.start} to {self.end}", remedy=remedy)

    def holds(self, file: DataFile) -> bool:
        """Whether a file's partition lies within."""
        return (self.start or dt.date.min) <= file.ingest_date <= (self.end or dt.date.max)
