"""The files of vector indexes under ``CATALOG/indexes/``, as far as the catalog knows them: which images they hold.

A segment is two files of one name: a Parquet file with the image and run of each vector, in order, and the vectors in
the format of the library that searches them. The first is written before the second and removed after it, so that no
file of vectors is ever there of which nobody knows whose they are. See :mod:`vlmflow.search.segments`.
"""

from __future__ import annotations

import pyarrow as pa

from vlmflow import schema
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, to_words
from vlmflow.errors import CatalogError

INDEXES = "indexes"
VECTORS_SUFFIX = ".faiss"
ROWS_SUFFIX = ".parquet"

# One row per vector of a segment, in the order of the vectors.
SEGMENT_ROWS = pa.schema(
    [
        pa.field("image_id", schema.KEY, nullable=False),
        pa.field("embed_run_id", pa.string(), nullable=False),
    ]
)


def files_holding(folder: Folder, wanted: KeyIndex) -> list[str]:
    """The files of indexes that hold vectors of images, or of which that cannot be told.

    Returns:
        Paths in the catalog, of each segment the vectors first: the order in which they are to be removed.
    """
    paths = {file.path for file in folder.list(INDEXES)}
    found: list[str] = []
    for path in sorted(paths):
        if path.endswith(VECTORS_SUFFIX):
            if _rows_path(path) not in paths:
                found.append(path)
        elif path.endswith(ROWS_SUFFIX) and _holds(folder, path, wanted):
            found += [vectors_path(path), path]
    return found


def vectors_path(rows_path: str) -> str:
    """The file of vectors that belongs to a file of rows."""
    return rows_path.removesuffix(ROWS_SUFFIX) + VECTORS_SUFFIX


def _rows_path(path: str) -> str:
    return path.removesuffix(VECTORS_SUFFIX) + ROWS_SUFFIX


def _holds(folder: Folder, path: str, wanted: KeyIndex) -> bool:
    try:
        rows = folder.read_parquet(path, ["image_id"])
    except CatalogError:
        # Removed meanwhile by whoever updates the index, or damaged: it is of no use either way.
        return True
    except (pa.ArrowException, KeyError):
        return True
    return bool((wanted.find(*to_words(rows["image_id"])) >= 0).any())
