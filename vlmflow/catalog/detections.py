"""Stored scores of detectors: which of those that a policy reads a row holds. Columns in, columns out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.columns import flat


class Detection(NamedTuple):
    """What tells a stored score from others.

    Attributes:
        detector: its name in the policy.
        model: the fingerprint that its scores carry.
    """

    detector: str
    model: str
    output: str


def places_of(
    detections: pa.Array | pa.ChunkedArray, wanted: Sequence[Detection]
) -> tuple[pa.StructArray, npt.NDArray[np.int64]]:
    """Finds scores in N lists of schema.DETECTION.

    Returns:
        The items of all lists, and (N, W) the item of each row and score wanted; -1: it has none.
    """
    lists = flat(detections)
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    items: pa.StructArray = pc.list_flatten(lists)
    places = np.full((len(lists), len(wanted)), -1, dtype=np.int64)
    for number, detection in enumerate(wanted):
        hit = pa.scalar(True)
        for name, value in detection._asdict().items():
            hit = pc.and_(hit, pc.equal(pc.struct_field(items, name), value))
        at = np.flatnonzero(np.asarray(pc.fill_null(hit, False)))
        places[rows[at], number] = at
    return items, places


def holds_all(detections: pa.Array | pa.ChunkedArray, wanted: Sequence[Detection]) -> npt.NDArray[np.bool_]:
    """(N,) the rows that have every score wanted."""
    _, places = places_of(detections, wanted)
    return np.asarray((places >= 0).all(axis=1), np.bool_)
