"""Updating the index: segments for rows that none covers, and none left that hold mostly what is gone."""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmflow.catalog import Catalog
from vlmflow.catalog.checksum import checksum, checksum_of
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import SEGMENT_ROWS, files_holding
from vlmflow.catalog.keys import index_of
from vlmflow.catalog.log import Snapshot, TableLog
from vlmflow.catalog.masks import Mask
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.errors import CatalogError
from vlmflow.search import index as ivf
from vlmflow.search.exact import Block, vector_blocks
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.segments import FORMAT, Index, Segment, SegmentInfo, read_index, write_segment
from vlmflow.workspace import Workspace

logger = logging.getLogger("vlmflow")

# Below this many vectors of a model the whole table is searched in well under a second.
FEWEST_ROWS = 50_000
# Vectors of one segment: half a GiB of memory while it is made, at 512 dimensions.
SEGMENT_MAX_ROWS = 500_000
_MAX_SMALL_SEGMENTS = 8
_OPERATION = "index"  # of runs
_GROWTH = 4  # cells are found anew when the catalog has grown by this factor


class IndexReport(Frozen):
    """What an update of the index did.

    Attributes:
        num_rows: live rows with a vector.
        num_covered: of these, rows that the index covers now.
        num_added: rows that this update added.
        num_segments: segments now.
        num_removed: files removed.
        num_damaged: segments of which the vectors were not what was written; others took their place.
        num_small: rows of models that have too few for an index; they are searched exactly.
    """

    num_rows: int = 0
    num_covered: int = 0
    num_added: int = 0
    num_segments: int = 0
    num_removed: int = 0
    num_small: int = 0
    num_damaged: int = 0
    seconds: float = 0.0


@dataclass
class _Totals:
    added: int = 0
    covered: int = 0
    segments: int = 0
    removed: list[str] = field(default_factory=list)
    small: int = 0
    damaged: int = 0


def update_index(
    config: CatalogConfig, *, min_rows: int = FEWEST_ROWS, segment_rows: int = SEGMENT_MAX_ROWS
) -> IndexReport:
    """Brings the catalog's index up to date with its embeddings; makes it if there is none.

    Searches go on meanwhile, and a killed update leaves at worst files that the next one removes.

    Args:
        min_rows: models with fewer rows get no index.
        segment_rows: at most so many vectors are in memory at once, in half precision.

    Raises:
        CatalogError: there is no catalog.
        ConfigError: faiss is not installed.
    """
    ivf.load_faiss()
    catalog = Catalog.open(config)
    started = time.monotonic()
    with catalog.runs.recorded(_OPERATION):
        # A lease is held: an erasure of this time knows that it has to be asked for again.
        return _Update(catalog, Folder(config), min_rows, segment_rows).execute(started)


class _Update:
    def __init__(self, catalog: Catalog, folder: Folder, min_rows: int, segment_rows: int) -> None:
        self._catalog, self._folder = catalog, folder
        self._min_rows, self._segment_rows = min_rows, segment_rows
        self._totals = _Totals()

    def execute(self, started: float) -> IndexReport:
        self._remove_erased()
        # Embeddings last: those of the rows just read are there by then.
        live = LiveRows(self._folder, TableLog.open(self._folder, "images").refresh())
        embeddings = TableLog.open(self._folder, "embeddings").refresh()
        useless = read_index(self._folder, live, ()).useless
        if self._is_alone():  # asked after the listing: else it may be half of what another is writing
            self._remove(useless)
        with Workspace() as workspace:
            for fingerprint, count in live.num_by_model.items():
                if count >= self._min_rows:
                    self._update_model(live, embeddings, fingerprint, workspace.path)
                else:
                    self._totals.small += count
        # An image that was erased meanwhile must not have come in.
        self._remove_erased()
        totals = self._totals
        return IndexReport(
            num_rows=sum(live.num_by_model.values()),
            num_covered=totals.covered,
            num_added=totals.added,
            num_segments=totals.segments,
            num_removed=len(totals.removed),
            num_small=totals.small,
            num_damaged=totals.damaged,
            seconds=time.monotonic() - started,
        )

    def _update_model(self, live: LiveRows, embeddings: Snapshot, fingerprint: str, workspace: Path) -> None:
        index = read_index(self._folder, live, (fingerprint,))
        wanted = live.of_models((fingerprint,))
        kept, dropped = _sort_out(index, int(wanted.sum()), self._segment_rows)
        damaged = tuple(segment for segment in kept if not self._is_whole(segment, workspace))
        kept, dropped = tuple(segment for segment in kept if segment not in damaged), (*dropped, *damaged)
        self._totals.damaged += len(damaged)
        wanted &= ~Index(kept, ()).covered(len(live))
        self._totals.covered += sum(segment.num_live for segment in kept)
        self._totals.segments += len(kept)
        if wanted.any():
            self._add(live, embeddings, fingerprint, kept, wanted, workspace)
        # Last, so that a search always finds one or the other.
        self._remove([path for segment in dropped for path in segment.paths])

    def _is_whole(self, segment: Segment, workspace: Path) -> bool:
        """Whether the vectors of a segment are what was written; of an older version's, whether they can be opened."""
        path, written = segment.paths[0], segment.info.checksum
        if written is not None:
            is_whole = checksum(self._folder.config, path) == written
        else:
            file = self._folder.local_copy(path, workspace, segment.info.num_bytes)
            try:
                ivf.OpenSegment(segment, file)
                is_whole = True
            except CatalogError:
                is_whole = False
            if file.parent == workspace:
                file.unlink()
        if not is_whole:
            logger.warning("index file %s is damaged: it is made anew", path)
        return is_whole

    def _add(
        self,
        live: LiveRows,
        embeddings: Snapshot,
        fingerprint: str,
        kept: tuple[Segment, ...],
        wanted: Mask,
        workspace: Path,
    ) -> None:
        total = int(wanted.sum())
        if kept:
            path = self._folder.local_copy(kept[0].paths[0], workspace, kept[0].info.num_bytes)
            empty = ivf.emptied(path, kept[0].paths[0])
            num_trained = kept[0].info.num_trained
        else:
            empty = ivf.train(self._sample(live, embeddings, wanted), ivf.num_cells(total))
            num_trained = total
        blocks = vector_blocks(self._folder, embeddings, live, wanted)
        for positions, index in _filled(blocks, empty, self._segment_rows):
            file = workspace / "segment"
            ivf.save(index, file)
            info = SegmentInfo(
                format=FORMAT,
                fingerprint=fingerprint,
                num_rows=len(positions),
                dim=index.d,
                num_cells=index.nlist,
                num_trained=num_trained,
                num_bytes=file.stat().st_size,
                embeddings_version=embeddings.version,
                created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                checksum=checksum_of(file),
            )
            write_segment(self._folder, info, _rows_of(live, positions), file)
            file.unlink()
            self._totals.added += len(positions)
            self._totals.covered += len(positions)
            self._totals.segments += 1

    def _sample(self, live: LiveRows, embeddings: Snapshot, wanted: Mask) -> NDArray[np.float32]:
        """(S, D) vectors at random, enough to find cells by."""
        rows = np.flatnonzero(wanted)
        size = min(len(rows), ivf.num_cells(len(rows)) * ivf.TRAIN_PER_CELL)
        chosen = np.zeros(len(wanted), np.bool_)
        chosen[np.random.default_rng(0).choice(rows, size, replace=False)] = True
        return np.concatenate([vectors for _, vectors in vector_blocks(self._folder, embeddings, live, chosen)])

    def _is_alone(self) -> bool:
        runs = self._catalog.runs
        at_work = [runs.get(run) or {} for run, state in runs.states().items() if state == "running"]
        updates = [record for record in at_work if record.get("operation") == _OPERATION]
        return len(updates) <= 1  # this one

    def _remove_erased(self) -> None:
        erased = self._catalog.erased_keys
        if len(erased):
            self._remove(files_holding(self._folder, index_of(erased)))

    def _remove(self, paths: list[str] | tuple[str, ...]) -> None:
        failed = set(self._folder.delete_all(list(paths)))
        self._totals.removed += [path for path in paths if path not in failed]


def _sort_out(index: Index, num_rows: int, segment_rows: int) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The segments that stay, and those whose live rows are written anew: mostly gone, or many and small."""
    if any(num_rows > _GROWTH * segment.info.num_trained for segment in index.segments):
        return (), index.segments
    thin = {segment.path for segment in index.segments if 2 * segment.num_live < segment.info.num_rows}
    small = {segment.path for segment in index.segments if 4 * segment.info.num_rows < segment_rows}
    dropped = thin | (small if len(small) >= _MAX_SMALL_SEGMENTS else set())
    return (
        tuple(segment for segment in index.segments if segment.path not in dropped),
        tuple(segment for segment in index.segments if segment.path in dropped),
    )


def _filled(blocks: Iterator[Block], empty: Any, segment_rows: int) -> Iterator[tuple[Positions, Any]]:
    """Indexes of at most so many vectors, and the rows of these. One at a time: the next is made from the last."""
    held: list[Positions] = []
    for positions, vectors in blocks:
        for start in range(0, len(positions), segment_rows):
            part = slice(start, start + segment_rows)
            if held and empty.ntotal + len(positions[part]) > segment_rows:
                yield np.concatenate(held), empty
                empty.reset()
                held = []
            empty.add(np.ascontiguousarray(vectors[part]))
            held.append(positions[part])
    if held:
        yield np.concatenate(held), empty


def _rows_of(live: LiveRows, positions: Positions) -> pa.Table:
    from vlmflow.catalog.keys import to_binary

    rows = live.take(positions, ["image_id", "embed_run_id"])
    columns = [to_binary(rows["image_id"]), rows["embed_run_id"].combine_chunks()]
    return pa.table(columns, schema=SEGMENT_ROWS)
