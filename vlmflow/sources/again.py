"""Reading the images of a catalog once more, by their rows alone: for pictures and maps.

A row does not say how its source held the image, but its uri and its object version together do: those of a member of
a tar file and of a row of a Parquet file name the file, and where in it the image lies. Images of Parquet files that
have a column of uris are looked for at these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from vlmflow.config import CatalogConfig, ImageLimits, SourceConfig
from vlmflow.schema import REFERENCE
from vlmflow.sources.base import Fetched
from vlmflow.sources.disk import home_of
from vlmflow.sources.reader import SourceReader
from vlmflow.storage import parse_address

# As `webdataset.py` and `parquet.py` write them, and `part_version` and `row_version`.
_MEMBER = re.compile(r"(.+?\.tar)#.+", re.DOTALL | re.IGNORECASE)
_PART = re.compile(r".+-([0-9a-f]{1,15})-([0-9a-f]{1,15})", re.DOTALL)
_CELL = re.compile(r"(.+\.parquet)#([0-9]{1,18})", re.DOTALL | re.IGNORECASE)


class Place(NamedTuple):
    """Where the bytes of an image are.

    Attributes:
        locator: the file, the object or the url.
        offset, length: bytes of it; None: all.
        row: of a Parquet file; None: it is none.
    """

    locator: str
    offset: int | None = None
    length: int | None = None
    row: int | None = None


def place_of(uri: str, object_version: str | None) -> Place:
    """Where the image of a row is to be read.

    Args:
        uri, object_version: as the row has them.
    """
    version = object_version or ""
    member, part = _MEMBER.fullmatch(uri), _PART.fullmatch(version)
    if member and part:
        return Place(member[1], int(part[1], 16), int(part[2], 16))
    cell = _CELL.fullmatch(uri)
    # The name of an object may end like that of a row, but its version does not.
    if cell and version.endswith(f"-{int(cell[2]):x}"):
        return Place(cell[1], row=int(cell[2]))
    return Place(uri)


class RowReader:
    """Reads images by the rows of a catalog, several at a time.

    A catalog in a store must not name files of the local disk, and urls of private hosts are refused, as in `enrich`.
    Whether the bytes are still those of the row is for the caller to see, by their hash.

    Args:
        source: the job's: its stores and http servers are reached as it says. None: stores as that of the catalog, and
            http servers as without a job file.
    """

    def __init__(self, catalog: CatalogConfig, limits: ImageLimits, source: SourceConfig | None = None) -> None:
        reached = SourceConfig(uri=catalog.uri, storage=catalog.storage)
        if source is not None:
            # Not its uri: that tells whether files of the local disk may be read, and any job may have written the row.
            how = {"storage": source.storage, "http": source.http, "bytes_column": source.bytes_column}
            reached = reached.model_copy(update=how)
        folder = parse_address(catalog.uri)
        self._reader = SourceReader(reached, limits, home_of(folder, folder), is_known=False)

    def read(self, images: Sequence[tuple[str, str | None]]) -> list[Fetched]:
        """Reads images, in order; one that cannot be had costs only itself.

        Args:
            images: uri and object version of each, as its row has them.

        Raises:
            StorageAccessError: a store is gone or refuses everything.
            TransientError: a store is out of reach.
        """
        rows: list[dict[str, Any]] = [
            {"image_id": "", "uri": uri} | place_of(uri, version)._asdict() for uri, version in images
        ]
        return self._reader.read(pa.Table.from_pylist(rows, REFERENCE))
