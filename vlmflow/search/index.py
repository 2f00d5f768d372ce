"""The approximate index, by faiss (Johnson et al. 2017, arXiv:1702.08734): inverted lists over k-means cells.

Of the libraries on PyPI, faiss-cpu was chosen over usearch and hnswlib: its lists are searched where they lie in a
memory-mapped file; a filter is looked at within the search, so that a rare one costs no recall; cells are found in a
minute on two cores where a graph over as many vectors takes much longer; and it ships wheels. usearch maps files too
but takes no filter from Python; hnswlib loads its whole graph and ships no wheel.

Vectors are kept in half precision, which moves a cosine by less than :data:`HALF_ERROR`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.errors import ConfigError
from vlmflow.search.exact import NOTHING, Found, best
from vlmflow.search.segments import Segment, gone

if TYPE_CHECKING:
    from types import ModuleType

# Cells that a query looks into, without a filter; measured by benchmarks/search.py.
PROBES = 160
HALF_ERROR = 1e-3
# Vectors behind each cell when cells are found, and fewest that a cell must stand for: a cell's centre is a mean, and
# must not give away the vector of a single image that is erased later.
TRAIN_PER_CELL = 48
FEWEST_PER_CELL = 8
_MAX_CELLS = 16_384
_TRAIN_SEED = 20_260_301


def load_faiss() -> ModuleType:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "the index needs faiss, which is not installed",
            remedy="Install vlmflow[search], or search exactly with --exact.",
        ) from error
    return faiss


def num_cells(num_rows: int) -> int:
    """How many cells suit a number of vectors: a power of two near four times its square root."""
    return int(min(_MAX_CELLS, 2 ** max(2, round(math.log2(4 * math.sqrt(max(num_rows, 1)))))))


def train(sample: NDArray[np.float32], cells: int) -> Any:
    """Finds cells by k-means on the sphere.

    Args:
        sample: (S, D) unit vectors.

    Returns:
        An empty index, ready for vectors; with fewer cells than asked for where some would stand for too few vectors.
    """
    faiss = load_faiss()
    dim = sample.shape[1]
    cells = max(1, min(cells, len(sample) // (2 * FEWEST_PER_CELL)))
    kmeans = faiss.Kmeans(
        dim,
        cells,
        niter=10,
        spherical=True,
        seed=_TRAIN_SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    kmeans.train(sample)
    _, nearest = kmeans.index.search(sample, 1)
    counts = np.bincount(nearest[:, 0], minlength=cells)
    centres = kmeans.centroids[counts >= FEWEST_PER_CELL]
    if not len(centres):
        centres = sample.mean(axis=0, keepdims=True)
    return _empty(centres)


def emptied(path: Path, name: str) -> Any:
    """An index without vectors, with the cells of one that is there, whose file has this name in the catalog."""
    faiss = load_faiss()
    held = _open(path, name)
    quantizer = faiss.downcast_index(held.quantizer)
    return _empty(quantizer.reconstruct_n(0, quantizer.ntotal))


def save(index: Any, path: Path) -> None:
    """Writes an index to a local file.

    Raises:
        ConfigError: the disk is full, or refuses.
    """
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as error:  # its text names lines of the library, and at the end the system's reason
        reason = re.search(r"\(([^()]*)\)\s*$", str(error))
        raise ConfigError(
            f"the index cannot be written to {path.parent}: {reason[1] if reason else 'the library gave up'}",
            remedy="Free space there, or set TMPDIR to a folder with more.",
        ) from error


def _empty(centres: NDArray[np.float32]) -> Any:
    faiss = load_faiss()
    quantizer = faiss.IndexFlatIP(centres.shape[1])
    quantizer.add(np.ascontiguousarray(centres, np.float32))
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        centres.shape[1],
        len(centres),
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # the vectors themselves, not what is left of them after their cell's centre
    )
    index.is_trained = True  # half precision needs no training
    return index


def _open(path: Path, name: str) -> Any:
    """Maps a file into memory; its lists are read as they are searched."""
    faiss = load_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise gone(name) from error


class OpenSegment:
    """A segment that can be searched."""

    def __init__(self, segment: Segment, path: Path) -> None:
        self.segment = segment
        self._index = _open(path, segment.paths[0])
        if self._index.ntotal != segment.info.num_rows or self._index.d != segment.info.dim:
            raise gone(segment.paths[0])
        self._positions = segment.positions
        self._live = self._positions >= 0

    def search(self, query: NDArray[np.float32], top_k: int, wanted: Mask | None) -> Found:
        """The best of the segment's live rows, of those that are marked.

        The fewer are marked, the more cells are looked into: about as many vectors are compared as without a filter,
        and all that are marked if they are few.

        Args:
            query: (D,) of unit length.
            wanted: (N,) over the live rows; None: all.
        """
        faiss = load_faiss()
        total = len(self._positions)
        marks = self._live if wanted is None else self._live & wanted[self._positions]
        count = int(marks.sum())
        if not count:
            return NOTHING
        probes = min(self._index.nlist, math.ceil(PROBES * total / count))
        # At least as many cells as are needed to have top_k rows to choose from.
        probes = min(self._index.nlist, max(probes, math.ceil(2 * top_k * self._index.nlist / count)))
        bits = np.packbits(marks, bitorder="little")
        selector = None if count == total else faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersIVF(nprobe=probes, **({} if selector is None else {"sel": selector}))
        scores, at = self._index.search(query[None], min(top_k, count), params=parameters)
        hits = self._hits(at[0])
        return Found(self._positions[at[0][hits]], scores[0][hits])

    @property
    def num_cells(self) -> int:
        """How many cells there are to look into."""
        return int(self._index.nlist)

    def neighbours(
        self, queries: NDArray[np.float32], least: float, marks: Mask, probes: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Pairs of a query and a marked vector whose cosine, in half precision, is above ``least``.

        Args:
            marks: (num_rows,) over the vectors of the segment.
            probes: how many cells are looked into.

        Returns:
            (P,) numbers of queries, in order, (P,) numbers of vectors, (P,) float32 cosines.
        """
        faiss = load_faiss()
        # What it knows not to be asked for, so that numbers that no vector has are found, and told.
        others = faiss.IDSelectorBitmap(np.packbits(~marks, bitorder="little"))
        parameters = faiss.SearchParametersIVF(nprobe=min(self.num_cells, probes), sel=faiss.IDSelectorNot(others))
        limits, scores, at = self._index.range_search(queries, least, params=parameters)
        self._hits(at)
        return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), at, scores

    def cells_of(self, queries: NDArray[np.float32], probes: int) -> NDArray[np.int16]:
        """(Q, probes) the cells that queries look into, nearest first; -1: there is none."""
        quantizer = load_faiss().downcast_index(self._index.quantizer)
        _, cells = quantizer.search(np.ascontiguousarray(queries), min(self.num_cells, probes))
        return np.asarray(cells, np.int16)

    def places_in(self, cell: int) -> NDArray[np.int64]:
        """The numbers of the vectors in a cell."""
        lists = self._index.invlists
        size = lists.list_size(cell)
        if not size:
            return np.empty(0, np.int64)
        ids = lists.get_ids(cell)
        try:
            places: NDArray[np.int64] = load_faiss().rev_swig_ptr(ids, size).copy()
        finally:
            lists.release_ids(cell, ids)
        return places[self._hits(places)]

    def _hits(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks what was found, as against places left empty."""
        if len(at) and not -1 <= at.min() <= at.max() < len(self._positions):
            raise gone(self.segment.paths[0])
        hits: NDArray[np.bool_] = at >= 0
        return hits


def search_segments(segments: list[OpenSegment], query: NDArray[np.float32], top_k: int, wanted: Mask | None) -> Found:
    """The best rows of all segments."""
    return best([NOTHING, *(segment.search(query, top_k, wanted) for segment in segments)], top_k)
