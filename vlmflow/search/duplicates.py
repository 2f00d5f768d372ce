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
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import flat
from vlmflow.catalog.keys import to_binary, to_words
from vlmflow.catalog.masks import Mask
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.errors import ConfigError, TooManyPairsError
from vlmflow.schema import LEAST_PHASH_BITS
from vlmflow.search.build import FEWEST_ROWS
from vlmflow.search.equals import Equals, Scored
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.near import MAX_PAIRS, ROUNDING, check_pairs, near_pairs
from vlmflow.search.searcher import Searcher

Kind: TypeAlias = Literal["exact", "perceptual", "semantic"]

# Cosine from which two images count as one. Tested with the starter's embedder on the 200 drawings of the demo: no two
# different ones reach 0.93, every copy at lower quality or a quarter of the size stays above 0.99, and 92% of those
# cropped by 3% on each side above 0.95. Other models spread their vectors otherwise. See
# tests/integration/test_search.py.
THRESHOLD = 0.95
# Of the 64 bits of two perceptual hashes, how many may differ. Five bands of bits: with four that differ, one band is
# equal, so only images that share a band are compared.
MAX_BITS = 4
_BANDS = (0, 13, 26, 39, 52, 64)
# Up to so many images each is compared with each; beyond, the index proposes whom to compare. Of fewer there is none.
ALL_PAIRS = FEWEST_ROWS
_BLOCK = 1_024  # with 50,000 others at a time: 200 MiB of cosines
_MAX_CELLS = 1 << 22  # hashes that are compared at a time, with each other: 32 MiB

_COLUMNS = ("image_id", "uri", "decision", "status", "width", "height", "size_bytes", "content_hash")


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
    notes: tuple[str, ...] = ()  # kinds that were not looked for, and why


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
        TooManyPairsError: so many pairs that the threshold tells nothing apart, where no other kind is asked for; else
            the groups of the others are reported, with a note.
        CatalogError: there is no catalog.
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
    notes: list[str] = []
    ranks = np.full(len(live), len(live), np.int64)
    ranks[order] = np.arange(len(order))
    if "perceptual" in kinds:
        alike = _unless_too_many(lambda: _look_alikes(live, unlike, ranks), "perceptual", kinds, notes)
        found += [("perceptual", *group) for group in alike]
        for members, _ in alike:
            unlike[members[1:]] = False
    if "semantic" in kinds:
        num_without = int(unlike.sum()) - int((unlike & live.of_models(list(live.num_by_model))).sum())
        near = _unless_too_many(lambda: _semantic(searcher, live, unlike, ranks, threshold), "semantic", kinds, notes)
        found += [("semantic", *group) for group in near]
    return DuplicateReport(
        catalog=catalog.uri,
        images_version=live.version,
        threshold=threshold if "semantic" in kinds else None,
        num_images=int(wanted.sum()),
        num_duplicates=sum(len(group) - 1 for _, group, _ in found),
        num_without_vectors=num_without,
        groups=tuple(_described(live, found)),
        notes=tuple(notes),
    )


def _unless_too_many(
    find: Callable[[], list[Scored]], kind: Kind, kinds: Sequence[Kind], notes: list[str]
) -> list[Scored]:
    """The groups of a kind; a note in their place where they come of too many pairs and other kinds are asked for."""
    try:
        return find()
    except TooManyPairsError as error:
        if set(kinds) == {kind}:
            raise
        notes.append(f"{kind} groups were left out: {error}. {error.remedy}")
        return []


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
        firsts = equals.rows[equals.starts]
        marks, numbers = np.zeros(len(live), np.bool_), np.full(len(live), -1, np.int64)
        marks[firsts], numbers[firsts] = True, np.arange(len(firsts))
        found = _grouped(list(_pairs(searcher, model, marks, threshold)), ranks)
        groups += equals.whole([(numbers[rows], scores) for rows, scores in found], ranks)
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


def _grouped(parts: list[tuple[Positions, Positions, NDArray[np.float32]]], ranks: NDArray[np.int64]) -> list[Scored]:
    """Groups from pairs: each around the row that comes first, of rows that are in no group before."""
    empty = np.empty(0, np.int64)
    left = np.concatenate([empty, *(part[0] for part in parts)])
    right = np.concatenate([empty, *(part[1] for part in parts)])
    scores = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    # Each pair once, seen from the one that comes first.
    forward = ranks[left] < ranks[right]
    left, right, scores = left[forward], right[forward], scores[forward]
    by_rank = np.lexsort((right, -scores, ranks[left]))
    left, right, scores = left[by_rank], right[by_rank], scores[by_rank]
    taken: set[int] = set()
    groups = []
    starts = np.flatnonzero(np.diff(left, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(left)]):
        head = int(left[start])
        if head in taken:
            continue
        free = []
        for at, other in enumerate(right[start:stop].tolist(), start):
            if other not in taken:  # nor earlier in this very group: the index may find a pair from both of its sides
                taken.add(other)
                free.append(at)
        if free:
            taken.add(head)
            members = np.array([head, *right[free]], np.int64)
            groups.append((members, np.array([1.0, *scores[free]], np.float32)))
    return sorted(groups, key=lambda group: (-len(group[0]), int(ranks[group[0][0]])))


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
    looks = Equals.of(hashes[positions], positions, ranks)
    return looks.whole(_grouped(list(_near_looks(looks.keys)), looks.ranks), ranks)


def _near_looks(values: NDArray[np.uint64]) -> Iterator[tuple[Positions, Positions, NDArray[np.float32]]]:
    """Pairs of hashes that differ in few bits, and the share of equal bits; both ways round."""
    num_pairs = 0
    for band, (low, high) in enumerate(pairwise(_BANDS)):
        keys = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        for first, last in pairwise([*starts.tolist(), len(order)]):
            some = order[first:last]
            step = max(1, _MAX_CELLS // len(some))
            for start in range(0, len(some) - 1, step):
                block, later = some[start : start + step], some[start:]
                bits = np.bitwise_count(values[block][:, None] ^ values[later][None, :])
                rows_at, columns_at = np.nonzero(np.triu(bits <= MAX_BITS, 1))
                left, right = _not_before(values, block[rows_at], later[columns_at], band)
                num_pairs += len(left)
                if num_pairs > MAX_PAIRS:
                    raise TooManyPairsError(
                        f"more than {MAX_PAIRS:,} pairs of images look alike", remedy="Narrow the images with --where."
                    )
                scores = (1 - np.bitwise_count(values[left] ^ values[right]) / 64).astype(np.float32)
                yield np.concatenate([left, right]), np.concatenate([right, left]), np.concatenate([scores, scores])


def _not_before(
    values: NDArray[np.uint64], left: Positions, right: Positions, band: int
) -> tuple[Positions, Positions]:
    """The pairs that share no band before this one: those were found there."""
    fresh = np.ones(len(left), np.bool_)
    for low, high in list(pairwise(_BANDS))[:band]:
        part = np.uint64(((1 << (high - low)) - 1) << low)
        fresh &= ((values[left] ^ values[right]) & part) != 0
    return left[fresh], right[fresh]


def _pairs(
    searcher: Searcher, model: str, mask: Mask, threshold: float
) -> Iterator[tuple[Positions, Positions, NDArray[np.float32]]]:
    """Pairs of marked rows whose cosine reaches the threshold, with it; a pair may come twice, turned around."""
    count = int(mask.sum())
    num_pairs = 0
    compare = _all_pairs if count <= ALL_PAIRS else near_pairs
    for part in compare(searcher, model, mask, threshold):
        num_pairs += len(part[0])
        check_pairs(num_pairs, threshold)
        yield part


def _all_pairs(
    searcher: Searcher, model: str, mask: Mask, threshold: float
) -> Iterator[tuple[Positions, Positions, NDArray[np.float32]]]:
    blocks = list(searcher.vectors(model, mask))
    if not blocks:
        return
    positions = np.concatenate([block[0] for block in blocks])
    vectors = np.concatenate([block[1] for block in blocks])
    for start in range(0, len(vectors), _BLOCK):
        scores = vectors[start : start + _BLOCK] @ vectors[start:].T
        rows, columns = np.nonzero(scores >= threshold - ROUNDING)
        later = columns > rows
        rows, columns = rows[later], columns[later]
        first, second = positions[start + rows], positions[start + columns]
        values = scores[rows, columns]
        # Both ways: which of the two comes first is not known here.
        yield np.concatenate([first, second]), np.concatenate([second, first]), np.concatenate([values, values])


def _described(live: LiveRows, found: list[tuple[Kind, Positions, NDArray[np.float32]]]) -> Iterator[Group]:
    if not found:
        return
    rows = live.take(np.concatenate([group for _, group, _ in found]), _COLUMNS).to_pylist()
    start = 0
    for kind, group, scores in found:
        members = tuple(
            Member(
                similarity=min(1.0, float(score)), **{name: row[name] for name in Member.model_fields if name in row}
            )
            for row, score in zip(rows[start : start + len(group)], scores, strict=True)
        )
        start += len(group)
        yield Group(kind=kind, members=members)
