"""Groups of images that are the same: to the byte, to the eye, or as far as the embeddings can tell.

A group has a representative, and every member is compared with it, not with any other member: so no chain of small
steps joins images that are unlike. The representative is the image with the most pixels, then the least id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import TypeAdapter

from vlmflow.catalog.columns import flat
from vlmflow.catalog.keys import to_binary, to_words
from vlmflow.catalog.masks import Mask
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.errors import ConfigError
from vlmflow.schema import LEAST_PHASH_BITS
from vlmflow.search.build import FEWEST_ROWS
from vlmflow.search.equals import Equals, Scored
from vlmflow.search.leaders import owners_of
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.looks import Looks
from vlmflow.search.near import IndexedVectors, NearVectors, to_disk
from vlmflow.search.searcher import Searcher
from vlmflow.workspace import Workspace

Kind: TypeAlias = Literal["exact", "perceptual", "semantic"]

# Cosine from which two images count as one. Tested with the starter's embedder on the 200 drawings of the demo: no two
# different ones reach 0.93, every copy at lower quality or a quarter of the size stays above 0.99, and 92% of those
# cropped by 3% on each side above 0.95. Other models spread their vectors otherwise. See
# tests/integration/test_search.py.
THRESHOLD = 0.95
# Up to so many images each is compared with each; beyond, the index proposes whom to compare. Of fewer there is none.
ALL_PAIRS = FEWEST_ROWS

_COLUMNS = ("image_id", "uri", "decision", "width", "height", "size_bytes")


class Member(Frozen):
    """An image of a group.

    ``similarity`` with the representative: 1 for equal bytes, the share of equal bits, or the cosine.
    """

    image_id: str
    uri: str
    decision: str
    width: int | None = None
    height: int | None = None
    size_bytes: int | None = None
    similarity: float


_MEMBERS = TypeAdapter(tuple[Member, ...])  # at once: one by one they take half as long again


class Group(Frozen):
    """Images that are the same; the representative is the first."""

    kind: Kind
    members: tuple[Member, ...]

    @property
    def representative(self) -> Member:
        """The one to keep."""
        return self.members[0]


class DuplicateReport(Frozen):
    """The groups of a catalog, those of equal bytes first, the largest first.

    Of a group of equal bytes only the representative takes part in perceptual groups, and of these in semantic ones.
    """

    catalog: str
    images_version: int
    threshold: float | None  # of semantic groups; None: these were not asked for
    num_images: int  # that were compared
    num_duplicates: int  # members beside the representatives
    num_without_vectors: int = 0  # of the images compared: they have no part in semantic groups
    groups: tuple[Group, ...] = ()


def find_duplicates(
    catalog: CatalogConfig,
    *,
    kinds: Sequence[Kind] = ("exact", "perceptual", "semantic"),
    threshold: float = THRESHOLD,
    where: str | None = None,
) -> DuplicateReport:
    """Groups the images of a catalog.

    Args:
        kinds: of groups: equal bytes, equal looks (pHash), and near ones by embedding.
        threshold: least cosine of an image with the representative of its semantic group.
        where: a condition in SQL; other images are left out.

    Raises:
        ConfigError: there is no such kind, or the threshold or the condition cannot be used.
        SearchError: too many images to compare each with each, and no index.
        CatalogError: there is no catalog.
        WorkspaceError: the temporary folder has no room for the vectors.
    """
    if not kinds or isinstance(kinds, str) or not set(kinds) <= set(get_args(Kind)):
        raise ConfigError(f"kinds {kinds!r}", remedy=f"Give a list of some of {', '.join(get_args(Kind))}.")
    if not 0 < threshold <= 1:
        raise ConfigError(f"--threshold {threshold}", remedy="Give a cosine above 0 and up to 1.")
    searcher = Searcher(catalog)
    live = searcher.refresh()
    wanted = np.ones(len(live), np.bool_) if where is None else live.mask(where)
    hashes, areas = _facts(live)
    wanted &= hashes >= 0
    order = _order(live, areas, wanted)
    firsts = _first_of_equal(hashes, order)
    groups = _exact_groups(hashes, order) if "exact" in kinds else []
    unlike = np.zeros(len(live), np.bool_)
    unlike[firsts] = True
    found: list[tuple[Kind, Positions, NDArray[np.float32]]] = [
        ("exact", group, np.ones(len(group), np.float32)) for group in groups
    ]
    num_without = 0
    ranks = np.full(len(live), len(live), np.int64)
    ranks[order] = np.arange(len(order))
    if "perceptual" in kinds:
        alike = _look_alikes(live, unlike, ranks)
        found += [("perceptual", *group) for group in alike]
        for members, _ in alike:
            unlike[members[1:]] = False
    if "semantic" in kinds:
        num_without = int(unlike.sum()) - int((unlike & live.of_models(list(live.num_by_model))).sum())
        found += [("semantic", *group) for group in _semantic(searcher, live, unlike, ranks, threshold)]
    return DuplicateReport(
        catalog=catalog.uri,
        images_version=live.version,
        threshold=threshold if "semantic" in kinds else None,
        num_images=int(wanted.sum()),
        num_duplicates=sum(len(group) - 1 for _, group, _ in found),
        num_without_vectors=num_without,
        groups=tuple(_described(live, found)),
    )


def _facts(live: LiveRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N,) a number for each content, -1 where nothing was read; and (N,) pixels of each image."""
    numbers: dict[str, int] = {}
    hashes = np.full(len(live), -1, np.int64)
    areas = np.zeros(len(live), np.int64)
    for start, rows in live.read(["content_hash", "width", "height"]):
        here = slice(start, start + rows.num_rows)
        coded = pc.dictionary_encode(flat(rows["content_hash"]))
        codes = [numbers.setdefault(value, len(numbers)) for value in coded.dictionary.to_pylist()]
        indices = pc.fill_null(coded.indices, len(codes)).to_numpy(zero_copy_only=False)
        hashes[here] = np.array([*codes, -1], np.int64)[indices]
        sides = [pc.fill_null(rows[name], 0).to_numpy().astype(np.int64) for name in ("width", "height")]
        areas[here] = sides[0] * sides[1]
    return hashes, areas


def _order(live: LiveRows, areas: NDArray[np.int64], wanted: Mask) -> Positions:
    """Marked rows in the order in which they become representatives."""
    ids = np.empty((len(live), 2), np.uint64)
    for start, rows in live.read(["image_id"]):
        ids[start : start + rows.num_rows] = np.stack(to_words(to_binary(rows["image_id"])), axis=1)
    rows_wanted = np.flatnonzero(wanted)
    return rows_wanted[np.lexsort((ids[rows_wanted, 1], ids[rows_wanted, 0], -areas[rows_wanted]))]


def _first_of_equal(hashes: NDArray[np.int64], order: Positions) -> Positions:
    _, first = np.unique(hashes[order], return_index=True)
    return order[first]


def _exact_groups(hashes: NDArray[np.int64], order: Positions) -> list[Positions]:
    by_hash = order[np.argsort(hashes[order], kind="stable")]
    starts = np.flatnonzero(np.diff(hashes[by_hash], prepend=-1))
    groups = np.split(by_hash, starts[1:]) if len(starts) else []
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), int(group[0])))


def _semantic(
    searcher: Searcher, live: LiveRows, mask: Mask, ranks: NDArray[np.int64], threshold: float
) -> list[Scored]:
    """Groups of marked rows by their vectors, those of each model apart.

    Rows of equal vectors are in one group and compared with others once: blank images, which may be thousands.
    """
    groups: list[Scored] = []
    for model in live.num_by_model:
        equals = _equal_vectors(searcher, model, mask & live.of_models([model]), ranks)
        order = np.argsort(equals.ranks)
        firsts = equals.rows[equals.starts][order]
        marks, numbers = np.zeros(len(live), np.bool_), np.full(len(live), -1, np.int64)
        marks[firsts], numbers[firsts] = True, np.arange(len(firsts))
        with Workspace() as workspace:
            vectors = to_disk(searcher.vectors(model, marks), numbers, len(firsts), workspace.path)
            near = (
                NearVectors(vectors, threshold)
                if len(firsts) <= ALL_PAIRS
                else IndexedVectors(vectors, threshold, searcher.covering(model, marks), numbers)
            )
            owners = owners_of(near)
            groups += equals.whole(_grouped(owners, order, near.cosines), ranks)
    return groups


def _equal_vectors(searcher: Searcher, model: str, mask: Mask, ranks: NDArray[np.int64]) -> Equals:
    """Marked rows by their vectors in half precision.

    Vectors that are equal there have a cosine within ``ROUNDING`` of 1. Of images with equal pixels the last bits may
    differ, by the batch that they were in.

    Raises:
        SearchError: too many of them are unlike to compare each with each, and the index does not cover all rows.
    """
    keys, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    unlike: NDArray[np.uint64] | None = np.empty(0, np.uint64)  # None: they are too many to compare each with each
    for positions, vectors in searcher.vectors(model, mask):
        digests = b"".join(blake2b(vector, digest_size=8).digest() for vector in vectors.astype(np.float16))
        keys.append(np.frombuffer(digests, np.uint64))
        rows.append(positions)
        if unlike is not None and len(unlike := np.union1d(unlike, keys[-1])) > ALL_PAIRS:
            searcher.covering(model, mask)  # now, and not when all vectors are read, of which there may be millions
            unlike = None
    return Equals.of(np.concatenate(keys), np.concatenate(rows), ranks)


def _grouped(
    owners: Positions, order: Positions, likeness: Callable[[Positions, Positions], NDArray[np.float32]]
) -> list[Scored]:
    """Groups of numbers of keys.

    Args:
        owners: (I,) the head of each item.
        order: (I,) the key that each item is.
        likeness: of items, of as many others.
    """
    members = np.flatnonzero(owners != np.arange(len(owners)))
    members = members[np.argsort(owners[members], kind="stable")]
    heads = owners[members]
    scores = likeness(heads, members)
    starts = np.flatnonzero(np.diff(heads, prepend=-1)).tolist()
    return [
        (order[np.append(heads[start], members[start:stop])], np.append(np.float32(1), scores[start:stop]))
        for start, stop in pairwise([*starts, len(members)])
    ]


def _look_alikes(live: LiveRows, mask: Mask, ranks: NDArray[np.int64]) -> list[Scored]:
    """Groups of marked rows whose perceptual hashes differ in few bits, by the share of equal bits.

    Rows of equal hashes are alike in all that they are like, so they are in one group: it is hashes that are compared.
    """
    hashes = np.zeros(len(live), np.uint64)
    known = mask.copy()
    for start, rows in live.read(["phash"]):
        here = slice(start, start + rows.num_rows)
        texts = rows["phash"].to_pylist()
        known[here] &= np.array([text is not None for text in texts], np.bool_)
        hashes[here] = np.array([int(text or "0", 16) for text in texts], np.uint64)
    known &= np.bitwise_count(hashes) >= LEAST_PHASH_BITS
    positions = np.flatnonzero(known)
    equals = Equals.of(hashes[positions], positions, ranks)
    order = np.argsort(equals.ranks)
    looks = Looks(equals.keys[order])
    return equals.whole(_grouped(owners_of(looks), order, looks.equal_bits), ranks)


def _described(live: LiveRows, found: list[tuple[Kind, Positions, NDArray[np.float32]]]) -> Iterator[Group]:
    if not found:
        return
    rows = live.take(np.concatenate([group for _, group, _ in found]), _COLUMNS)
    scores = np.minimum(1, np.concatenate([part for _, _, part in found]).astype(np.float64))
    members = _MEMBERS.validate_python(rows.append_column("similarity", pa.array(scores)).to_pylist())
    start = 0
    for kind, group, _ in found:
        yield Group(kind=kind, members=members[start : start + len(group)])
        start += len(group)
