"""What a listing tells of a file of the catalog's folder."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass

# How obstore calls a file of a local disk until it is whole: listings leave such names out, and it takes none.
UNFINISHED = re.compile(r"(.+)#\d+")


@dataclass(frozen=True)
class FileInfo:
    """A file of the folder."""

    path: str  # relative to the folder
    size_bytes: int
    modified_at: dt.datetime

    @property
    def is_unfinished(self) -> bool:
        """Whether somebody was writing it, and may be at it still."""
        return UNFINISHED.fullmatch(self.path) is not None

    @property
    def finished_path(self) -> str:
        """Its path, or what that would have become."""
        match = UNFINISHED.fullmatch(self.path)
        return match[1] if match else self.path
