"""Segments: the files of an approximate index, each with some of the vectors and the rows that these belong to.

A segment never changes: an update adds segments for rows that no segment covers, and now and then puts one in the
place of several. A vector counts if the live image row still refers to the run that wrote it; all others are passed
over, and rows that no segment covers are searched exactly. So an index is never wrong about what is live, only
slower than it could be, and it says how many rows it covers.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import INDEXES, ROWS_SUFFIX, SEGMENT_ROWS, vectors_path
from vlmflow.errors import CatalogError
from vlmflow.search.live import LiveRows, Positions

FORMAT = 1  # of segments; others are passed over, and removed by the next update
_METADATA = b"vlmflow.segment"


@dataclass(frozen=True)
class SegmentInfo:
    """What a segment says of itself.

    Attributes:
        fingerprint: of the model that made the vectors.
        num_trained: rows of the catalog when its cells were found.
        embeddings_version: of the embeddings table that the vectors were read from.
        checksum: of the file of vectors; None: of an older version, which wrote none.
    """

    format: int
    fingerprint: str
    num_rows: int
    dim: int
    num_cells: int
    num_trained: int
    num_bytes: int  # of the file of vectors
    embeddings_version: int
    created_at: str
    checksum: str | None = None


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment and the live rows that its vectors stand for."""

    info: SegmentInfo
    path: str  # of its rows, in the catalog
    positions: Positions  # (num_rows,); -1: the row was replaced, erased, or is covered by another segment
    num_live: int

    @property
    def paths(self) -> tuple[str, str]:
        """Its files in the order of their removal."""
        return vectors_path(self.path), self.path


@dataclass(frozen=True)
class Index:
    """The segments over one version of the images table; and files that are of no use, to be removed by an update."""

    segments: tuple[Segment, ...]
    useless: tuple[str, ...]

    def covered(self, num_live: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """(num_live,) rows that a segment covers."""
        mask = np.zeros(num_live, np.bool_)
        for segment in self.segments:
            mask[segment.positions[segment.positions >= 0]] = True
        return mask


def read_index(folder: Folder, live: LiveRows, fingerprints: Sequence[str]) -> Index:
    """The segments for vectors of these models, and what each covers of the live rows. Loads no vector."""
    files = {file.path: file for file in folder.list(INDEXES)}
    useless = [
        path for path in files if not path.endswith(ROWS_SUFFIX) and path[: path.rfind(".")] + ROWS_SUFFIX not in files
    ]
    found: list[tuple[SegmentInfo, str, pa.Table]] = []
    models = live.num_by_model
    for path in sorted(path for path in files if path.endswith(ROWS_SUFFIX)):
        read = _read_rows(folder, path)
        held = files.get(vectors_path(path))
        if read is None or held is None or held.size_bytes != read[0].num_bytes or read[0].fingerprint not in models:
            useless += [vectors_path(path), path]
        elif read[0].fingerprint in fingerprints:
            found.append((read[0], path, read[1]))
    segments = []
    free = np.ones(len(live), np.bool_)
    for info, path, rows in sorted(found, key=lambda item: (-item[0].num_rows, item[1])):
        at = live.locate(rows["image_id"], rows["embed_run_id"])
        known = at >= 0
        at[known] = np.where(free[at[known]], at[known], -1)
        taken = at[at >= 0]
        free[taken] = False
        segments.append(Segment(info, path, at, len(taken)))
    return Index(tuple(segments), tuple(useless))


def write_segment(folder: Folder, info: SegmentInfo, rows: pa.Table, vectors: Path) -> str:
    """Puts a segment into the catalog; returns the path of its rows.

    Args:
        rows: of ``SEGMENT_ROWS``, in the order of the vectors.
        vectors: the local file of the library.
    """
    path = f"{INDEXES}/{info.fingerprint[:16]}/{uuid.uuid4().hex}{ROWS_SUFFIX}"
    described = rows.replace_schema_metadata({_METADATA: json.dumps(asdict(info)).encode()})
    folder.write_parquet(path, described)  # first: see vlmflow.catalog.indexes
    folder.upload(vectors_path(path), vectors)
    return path


def _read_rows(folder: Folder, path: str) -> tuple[SegmentInfo, pa.Table] | None:
    """None: the file is damaged, of another format, or has just been removed."""
    data = folder.read(path)
    if data is None:
        return None
    try:
        rows = pq.read_table(pa.BufferReader(data))
        info = SegmentInfo(**json.loads((rows.schema.metadata or {})[_METADATA]))
        rows = rows.select(SEGMENT_ROWS.names).cast(SEGMENT_ROWS)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    return (info, rows) if info.format == FORMAT and info.num_rows == rows.num_rows else None


def gone(path: str) -> CatalogError:
    """The error of a segment that cannot be read."""
    return CatalogError(
        f"index file {path} cannot be read",
        remedy="`vlmflow search CATALOG --build-index` puts a new one in its place; --exact does without the index.",
    )
