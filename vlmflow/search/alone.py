"""Which vectors have another near them, among very many that mostly have none.

Cell by cell of the index: what looks into a cell is compared with what is in it as one product of matrices, which
takes a fraction of the time of a search for each vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlmflow.catalog.masks import Mask
from vlmflow.search.index import OpenSegment
from vlmflow.search.live import Positions

_QUERIES = 1 << 18  # whose cells are known at a time: 16 cells of each are 34 MiB
_ROWS, _OTHERS = 4_096, 1_024  # of a product: 16 MiB of cosines
# Of a cosine between two ways to compute it in single precision. What is taken for near here is looked at again.
_SLACK = 1e-5


def have_near(segment: OpenSegment, items: Positions, vectors: NDArray[np.float32], least: float, probes: int) -> Mask:
    """Marks the vectors that have another with a cosine of ``least`` in one of the cells which they look into.

    Some that have none may be marked, if one falls short by less than rounding. In a dense group nearly all are found
    by a first look at some of a cell, and are looked at no more.

    Args:
        items: (R,) of the vectors of the segment, the number of each; -1: it has none.
        vectors: (I, D) of unit length.
        probes: cells that each looks into.
    """
    found = np.zeros(len(vectors), np.bool_)
    for start in range(0, len(vectors), _QUERIES):
        cells = segment.cells_of(vectors[start : start + _QUERIES], probes)
        order = np.argsort(cells.ravel(), kind="stable")
        bounds = np.searchsorted(cells.ravel()[order], np.arange(segment.num_cells + 1))
        for cell in range(segment.num_cells):
            queries = start + order[bounds[cell] : bounds[cell + 1]] // cells.shape[1]
            members = items[segment.places_in(cell)]
            _look(queries, members[members >= 0], vectors, least - _SLACK, found)
    return found


def _look(queries: Positions, members: Positions, vectors: NDArray[np.float32], least: float, found: Mask) -> None:
    for at in range(0, len(members), _OTHERS):
        some = np.sort(members[at : at + _OTHERS])
        others = vectors[some].T
        for part in _parts(queries[~found[queries]]):
            cosines = vectors[part] @ others
            # A vector is not its own neighbour.
            columns = np.minimum(np.searchsorted(some, part), len(some) - 1)
            own = np.flatnonzero(some[columns] == part)
            cosines[own, columns[own]] = -1
            found[part[cosines.max(axis=1) >= least]] = True


def _parts(queries: Positions) -> Iterator[Positions]:
    for at in range(0, len(queries), _ROWS):
        yield queries[at : at + _ROWS]
