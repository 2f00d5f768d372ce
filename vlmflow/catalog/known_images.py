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
        """All lists, by name."""
        found = []
        for file in sorted(self._folder.list(KNOWN), key=lambda file: file.path):
            content = self._folder.read_json(file.path) if file.path.endswith(".json") else None
            if content is not None:
                texts: dict[str, Any] = {name: tuple(content.pop(name)) for name in ("hashes", "phashes")}
                found.append(KnownList(**content, **texts))
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
        looks = self._look_alikes(phash)
        for known, distances in looks:
            hit = distances <= known.max_distance
            reasons = [f"looks like a listed image ({distance} of 64 bits differ)" for distance in distances[hit]]
            _put(columns, hit, known, reasons)
        for kind in ("allow", "block"):
            for known in self.lists:
                if known.kind == kind and known.hashes:
                    hit = as_mask(pc.is_in(flat(content_hash), value_set=pa.array(known.hashes, pa.string())))
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

    def _look_alikes(self, phash: pa.ChunkedArray) -> list[tuple[KnownList, NDArray[np.int64]]]:
        """Per list with perceptual hashes, (N,) the least distance to any of them; 65: there is no hash."""
        looking = [known for known in self.lists if known.phashes]
        if not looking:
            return []
        values = flat(phash)
        known_at = np.flatnonzero(as_mask(pc.is_valid(values)))
        given = np.array([int(text, 16) for text in values.drop_null().to_pylist()], np.uint64)
        out = []
        for known in looking:
            wanted = np.array([int(text, 16) for text in known.phashes], np.uint64)
            least = np.full(len(values), 65, np.int64)
            for start in range(0, len(given), _CHUNK):
                some = given[start : start + _CHUNK]
                places = known_at[start : start + len(some)]
                for first in range(0, len(wanted), _CHUNK):
                    bits = np.bitwise_count(some[:, None] ^ wanted[None, first : first + _CHUNK])
                    least[places] = np.minimum(least[places], bits.min(axis=1))
            out.append((known, least))
        return out


def _put(columns: dict[str, NDArray[np.object_]], hit: NDArray[np.bool_], known: KnownList, reasons: list[str]) -> None:
    columns["decision"][hit] = known.kind
    columns["reviewer"][hit] = f"{LIST_PREFIX}{known.name}"
    columns["reason"][hit] = reasons


def _path(name: str) -> str:
    return f"{KNOWN}/{name}.json"
