"""Lists of known images: blocked by the bytes or by how they look, allowed by the bytes alone. No model is asked.

The lists are kept under ``known/`` in the catalog, one file each. What they say stands in rows as a verdict does, under
the reviewer ``list:NAME``; a person's verdict on the same bytes goes before it.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.catalog.columns import flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import LIST_PREFIX
from vlmflow.catalog.masks import as_mask
from vlmflow.errors import KnownImagesError

KNOWN = "known"
MAX_DISTANCE = 16  # of 64 bits; beyond it images share hardly more than chance gives
Kind = Literal["block", "allow"]
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_CHUNK = 1_024  # rows that are compared at once, with as many hashes of a list: 8 MB, however long that is
_MAX_CELLS = 1 << 18  # pairs of an equal band that are compared at once: 10 MB
# Where so many bits may differ, of bands of bits one more than that one is equal: only hashes with an equal band are
# compared. With 40,000 hashes and 4 bits that is 80 times as fast; beyond 6 bits bands are short, and it is slower.
_MAX_BANDED = 6
_FAR = 65


@dataclass(frozen=True)
class KnownList:
    """One list.

    Attributes:
        hashes: sha256 of bytes, hexadecimal.
        phashes: perceptual hashes, 16 hexadecimal digits; of a block list alone.
        max_distance: differing bits up to which an image counts as one of these.
    """

    name: str
    kind: Kind
    hashes: tuple[str, ...]
    phashes: tuple[str, ...] = ()
    max_distance: int = 4
    added_at: str = ""

    @property
    def num_ignored(self) -> int:
        """Perceptual hashes that no image is compared with: plain images have them. Older versions listed them."""
        return int((~_is_seen(_parsed(self.phashes))).sum())

    def check(self) -> None:
        """Refuses a list that cannot be used.

        Raises:
            KnownImagesError: names what is wrong.
        """
        if not _NAME.fullmatch(self.name):
            raise KnownImagesError(f"list {self.name!r}", remedy="Name it in lower-case letters, digits, - and _.")
        if self.kind == "allow" and self.phashes:
            raise KnownImagesError(
                f"list {self.name}: {len(self.phashes):,} perceptual hashes would allow images",
                remedy="Allow by sha256 of the bytes: what looks like an allowed image may differ where it counts.",
            )
        if not 0 <= self.max_distance <= MAX_DISTANCE:
            raise KnownImagesError(
                f"list {self.name}: distance {self.max_distance}", remedy=f"Give 0 to {MAX_DISTANCE} of the 64 bits."
            )
        if not self.hashes and not self.phashes:
            raise KnownImagesError(f"list {self.name} is empty", remedy="Give a sha256 or a perceptual hash per line.")


class KnownStore:
    """Reads and changes the lists of a catalog."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def put(self, known: KnownList) -> None:
        """Puts a list in place, instead of one of its name.

        Raises:
            KnownImagesError: it cannot be used.
        """
        known.check()
        content = {**vars(known), "added_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
        self._folder.write(_path(known.name), json.dumps(content).encode("utf-8"))

    def remove(self, name: str) -> None:
        """Removes a list.

        Raises:
            KnownImagesError: there is none of this name.
        """
        if self._folder.stat(_path(name)) is None:
            there = ", ".join(known.name for known in self.lists()) or "none"
            raise KnownImagesError(f"list {name!r} is not in the catalog (there: {there})", remedy="Check the name.")
        self._folder.delete(_path(name))

    def lists(self) -> list[KnownList]:
        """All lists, by name.

        Raises:
            CatalogError, KnownImagesError: one is damaged: nothing is moderated without it.
        """
        found = []
        for file in sorted(self._folder.list(KNOWN), key=lambda file: file.path):
            content = self._folder.read_json(file.path) if file.path.endswith(".json") else None
            if content is not None:
                try:
                    texts: dict[str, Any] = {name: tuple(content.pop(name)) for name in ("hashes", "phashes")}
                    found.append(KnownList(**content, **texts))
                except (KeyError, TypeError) as error:
                    raise KnownImagesError(
                        f"{self._folder.config.uri}: {file.path} is no list of known images",
                        remedy="Put it back from a copy, or remove it, with what it blocks and allows.",
                    ) from error
        return found

    def matcher(self) -> KnownImages:
        """All lists, made ready to match."""
        return KnownImages(self.lists())


class KnownImages:
    """Finds known images. Picklable. N: images.

    Attributes:
        lists: those that are looked through.
    """

    def __init__(self, lists: Iterable[KnownList]) -> None:
        self.lists = list(lists)

    def __len__(self) -> int:
        return sum(len(known.hashes) + len(known.phashes) for known in self.lists)

    def verdicts(self, content_hash: pa.ChunkedArray, phash: pa.ChunkedArray) -> pa.StructArray:
        """What the lists say of images.

        Blocked bytes come first, then allowed ones, then what looks like a blocked image: an allow list takes back what
        the look alone would block.

        Args:
            content_hash, phash: (N,) as in the images table; null: not known.

        Returns:
            (N,) of schema.VERDICT; null: no list knows the image.
        """
        count = len(content_hash)
        columns: dict[str, NDArray[np.object_]] = {
            name: np.full(count, None, object) for name in ("decision", "reviewer", "reason")
        }
        for known, distances in self._look_alikes(phash):
            hit = distances <= known.max_distance
            reasons = [f"looks like a listed image ({distance} of 64 bits differ)" for distance in distances[hit]]
            _put(columns, hit, known, reasons)
        for kind in ("allow", "block"):
            for known, hashes in self._hashes:
                if known.kind == kind:
                    hit = as_mask(pc.is_in(flat(content_hash), value_set=hashes))
                    _put(columns, hit, known, ["equal bytes"] * int(hit.sum()))
        none = pa.nulls(count, pa.string())
        arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        arrays |= {"content_hash": flat(content_hash), "at": pa.nulls(count, schema.TIMESTAMP)}
        absent = pc.is_null(arrays["decision"])
        return pa.StructArray.from_arrays(
            [arrays.get(field.name, none).cast(field.type) for field in schema.VERDICT],
            fields=list(schema.VERDICT),
            mask=absent,
        )

    # Made once, though they are asked of every file: a list may be long.
    @cached_property
    def _hashes(self) -> list[tuple[KnownList, pa.Array]]:
        return [(known, pa.array(known.hashes, pa.string())) for known in self.lists if known.hashes]

    @cached_property
    def _looks(self) -> list[tuple[KnownList, _Looks]]:
        parsed = [(known, _parsed(known.phashes)) for known in self.lists if known.phashes]
        seen = [(known, values[_is_seen(values)]) for known, values in parsed]
        return [(known, _Looks(values, known.max_distance)) for known, values in seen if len(values)]

    def _look_alikes(self, phash: pa.ChunkedArray) -> list[tuple[KnownList, NDArray[np.int64]]]:
        """Per list with perceptual hashes, (N,) the least distance to any of them; 65: none is near, or no hash."""
        if not self._looks:
            return []
        values = flat(phash)
        parsed = _parsed(values.drop_null().to_pylist())
        seen = _is_seen(parsed)
        known_at = np.flatnonzero(as_mask(pc.is_valid(values)))[seen]
        # Images of equal looks are as far from a list: each hash is compared once.
        given, at = np.unique(parsed[seen], return_inverse=True)
        out = []
        for known, looks in self._looks:
            least = np.full(len(values), _FAR, np.int64)
            least[known_at] = looks.nearest(given)[at]
            out.append((known, least))
        return out


class _Looks:
    """The perceptual hashes of one list, made ready to be looked up. W: how many.

    Args:
        values: (W,) or more, as they come.
        max_distance: bits that may differ.
    """

    def __init__(self, values: NDArray[np.uint64], max_distance: int) -> None:
        self._values = np.unique(values)  # (W,)
        # Of each band its lowest bit and its mask; (W,) what stands in it, in order, and the hashes in this order.
        self._bands: list[tuple[np.uint64, np.uint64, NDArray[np.uint64], NDArray[np.uint64]]] = []
        edges = np.linspace(0, 64, max_distance + 2).astype(int).tolist() if max_distance <= _MAX_BANDED else []
        for low, high in pairwise(edges):
            shift, mask = np.uint64(low), np.uint64((1 << (high - low)) - 1)
            parts = (self._values >> shift) & mask
            order = np.argsort(parts, kind="stable")
            self._bands.append((shift, mask, parts[order], self._values[order]))

    def nearest(self, given: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(N,) the least distance of each hash to any of the list; of those that are not near it may be 65."""
        least = np.full(len(given), _FAR, np.int64)
        for shift, mask, parts, values in self._bands:
            mine = (given >> shift) & mask
            first = np.searchsorted(parts, mine, "left")
            counts = np.searchsorted(parts, mine, "right") - first
            rows = np.flatnonzero(counts)
            starts = np.searchsorted(np.cumsum(counts[rows]), np.arange(0, counts.sum(), _MAX_CELLS), "right")
            for some in np.split(rows, np.unique(starts)[1:]):
                _lower(least, some, given, values, first[some], counts[some])
        if not self._bands:
            for start in range(0, len(given), _CHUNK):
                part = given[start : start + _CHUNK]
                for first_of in range(0, len(self._values), _CHUNK):
                    bits = np.bitwise_count(part[:, None] ^ self._values[None, first_of : first_of + _CHUNK])
                    here = slice(start, start + len(part))
                    least[here] = np.minimum(least[here], bits.min(axis=1))
        return least


def _lower(
    least: NDArray[np.int64],
    rows: NDArray[np.int64],
    given: NDArray[np.uint64],
    values: NDArray[np.uint64],
    first: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    """Lowers the least distance of some rows by what each is compared with: ``counts`` values from ``first`` on."""
    if len(rows):
        starts = np.cumsum(counts) - counts
        at = np.arange(int(counts.sum())) + np.repeat(first - starts, counts)
        bits = np.bitwise_count(np.repeat(given[rows], counts) ^ values[at])
        least[rows] = np.minimum(least[rows], np.minimum.reduceat(bits, starts))


def _parsed(texts: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([int(text, 16) for text in texts], np.uint64)


def _is_seen(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether perceptual hashes tell an image; those of plain ones are all alike."""
    found: NDArray[np.bool_] = np.bitwise_count(values) >= schema.LEAST_PHASH_BITS
    return found


def _put(columns: dict[str, NDArray[np.object_]], hit: NDArray[np.bool_], known: KnownList, reasons: list[str]) -> None:
    columns["decision"][hit] = known.kind
    columns["reviewer"][hit] = f"{LIST_PREFIX}{known.name}"
    columns["reason"][hit] = reasons


def _path(name: str) -> str:
    return f"{KNOWN}/{name}.json"
