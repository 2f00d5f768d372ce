"""Exact search: the stored vectors, file by file, against one query; never more than a few files in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import Snapshot
from vlmflow.catalog.masks import Mask, as_mask
from vlmflow.catalog.read import read_each, read_rows
from vlmflow.errors import CatalogError
from vlmflow.search.live import VIEW, LiveRows, Positions

BLOCK_ROWS = 65_536
_SMALL_BYTES = 8 * 1024 * 1024  # of a file
Block: TypeAlias = tuple[Positions, NDArray[np.float32]]  # (B,) numbers of live rows, (B, D) their vectors
_KEY_COLUMNS = ["image_id", "embed_run_id", "view"]


@dataclass(frozen=True, eq=False)
class Found:
    """The best rows, the best first. K: how many.

    Attributes:
        positions: (K,) numbers of live rows.
        scores: (K,) float32 cosines with the query.
    """

    positions: Positions
    scores: NDArray[np.float32]


NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.float32))


def best(parts: list[Found], top_k: int) -> Found:
    """The best of several lists; equals in the order of rows, so that the answer is the same each time."""
    positions = np.concatenate([part.positions for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    order = np.lexsort((positions, -scores))[:top_k]
    return Found(positions[order], scores[order])


def search_exact(blocks: Iterator[Block], query: NDArray[np.float32], top_k: int) -> Found:
    """The rows whose vectors have the greatest cosine with a query.

    Args:
        blocks: of :func:`vector_blocks`.
        query: (D,) of unit length.

    Raises:
        CatalogError: a vector has another number of dimensions than the query.
    """
    found = NOTHING
    for positions, vectors in blocks:
        if vectors.shape[1] != len(query):
            raise CatalogError(
                f"a stored vector has {vectors.shape[1]} dimensions, the query {len(query)}",
                remedy="Ask with the profile that the catalog was made with.",
            )
        scores = vectors @ query
        if len(scores) > top_k:
            # All that equal the last of the best, of which some selection would be another for another top_k.
            some = scores >= np.partition(scores, -top_k)[-top_k]
            positions, scores = positions[some], scores[some]
        found = best([found, Found(positions, scores)], top_k)
    return found


def vector_blocks(folder: Folder, embeddings: Snapshot, live: LiveRows, wanted: Mask) -> Iterator[Block]:
    """The vectors of marked live rows, each row once, in blocks: (B,) numbers of rows and (B, D) float32.

    Large files that hold none of them are passed over after a look at their keys; small ones, of which a catalog of
    years has thousands, are read at once.
    """
    left = wanted.copy()
    dates = live.dates_of(left)
    files = sorted((file for file in embeddings.files.values() if file.ingest_date in dates), key=lambda f: f.path)
    small = [file for file in files if file.size_bytes <= _SMALL_BYTES]
    large = [file for file in files if file.size_bytes > _SMALL_BYTES]
    both = read_each(folder, "embeddings", small, [*_KEY_COLUMNS, "vector"], ahead=4)
    for file, keys in itertools.chain(both, read_each(folder, "embeddings", large, _KEY_COLUMNS, ahead=4)):
        at = _claim(keys, live, left)
        rows = np.flatnonzero(at >= 0)
        if not len(rows):
            continue
        held = keys if "vector" in keys.column_names else read_rows(folder, "embeddings", file, ["vector"])
        lists = flat(held["vector"])
        if not _are_even(lists):  # compaction has joined what several models made: only one of them was asked for
            lists, at, rows = lists.take(pa.array(rows)), at[rows], np.arange(len(rows))
        vectors = _to_matrix(lists)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            is_run = int(block[-1] - block[0]) + 1 == len(block)
            yield at[block], vectors[block[0] : block[-1] + 1] if is_run else vectors[block]  # a run is not copied


def _claim(keys: pa.Table, live: LiveRows, left: Mask) -> Positions:
    """The live row of each vector that is still wanted, and -1 for the others; takes them off ``left``."""
    at = live.locate(to_binary(keys["image_id"]), keys["embed_run_id"])
    at = np.where(as_mask(pc.equal(keys["view"], VIEW)), at, -1)
    known = at >= 0
    at[known] = np.where(left[at[known]], at[known], -1)
    rows = np.flatnonzero(at >= 0)
    # A run that was killed may have written the same vector twice.
    _, first = np.unique(at[rows], return_index=True)
    once = np.full(len(at), -1, np.int64)
    once[rows[first]] = at[rows[first]]
    left[once[once >= 0]] = False
    return once


def _are_even(vectors: pa.ListArray[Any]) -> bool:
    """Whether they have one number of dimensions."""
    lengths = np.asarray(pc.list_value_length(vectors))
    return not len(lengths) or bool((lengths == lengths[0]).all())


def _to_matrix(vectors: pa.ListArray[Any]) -> NDArray[np.float32]:
    if not _are_even(vectors):
        raise CatalogError(
            "vectors of one model differ in their number of dimensions",
            remedy="Restore the file, or embed again with `vlmflow enrich --tasks embed`.",
        )
    return np.asarray(pc.list_flatten(vectors), np.float32).reshape(len(vectors), -1)
