"""Image ids as 128-bit keys in Arrow and NumPy, so that millions of them never become Python objects."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import flat
from vlmflow.errors import CatalogError

KEY_BYTES = 16
_HEX_DIGITS = 2 * KEY_BYTES

# Value of each ASCII code as a hexadecimal digit; 255: not one.
_NIBBLES = np.full(256, 255, dtype=np.uint8)
for _value, _digit in enumerate("0123456789abcdef"):
    _NIBBLES[ord(_digit)] = _value

Words: TypeAlias = npt.NDArray[np.uint64]


def to_binary(image_id: pa.Array | pa.ChunkedArray) -> pa.FixedSizeBinaryArray:
    """Turns image ids (32 lower-case hexadecimal digits) into keys of 16 bytes.

    Raises:
        CatalogError: a value is null or is not such an id.
    """
    ids = flat(image_id).cast(pa.string())
    lengths = pc.binary_length(ids)
    if ids.null_count or not pc.all(pc.equal(lengths, _HEX_DIGITS), min_count=0).as_py():
        bad = ids.filter(pc.fill_null(pc.not_equal(lengths, _HEX_DIGITS), True))[0].as_py()
        raise _no_id(bad)
    return from_bytes(_hex_to_bytes(_value_bytes(ids)))


def from_bytes(values: npt.NDArray[np.uint8]) -> pa.FixedSizeBinaryArray:
    """Wraps an (N, 16) uint8 array as keys, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(schema.KEY, len(values), [None, data])


def to_words(keys: pa.Array | pa.ChunkedArray) -> tuple[Words, Words]:
    """Splits keys into their high and low 64 bits, each an (N,) array in the byte order of this machine."""
    array = flat(keys)
    if len(array) == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    raw = np.frombuffer(array.buffers()[1], dtype=">u8", count=2 * len(array), offset=array.offset * KEY_BYTES)
    pairs = raw.reshape(-1, 2).astype(np.uint64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def concat(arrays: Sequence[pa.Array | pa.ChunkedArray]) -> pa.FixedSizeBinaryArray:
    """Joins arrays of keys; an empty array if there are none."""
    return pa.concat_arrays([pa.array([], schema.KEY), *(flat(array).cast(schema.KEY) for array in arrays)])


def duplicates(keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Marks every key that stands further up in the array already."""
    return repeated(*to_words(keys))


def repeated(high: Words, low: Words) -> npt.NDArray[np.bool_]:
    """As :func:`duplicates`, of the words of keys."""
    order = np.lexsort((np.arange(len(high)), low, high))
    equal = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    marks = np.zeros(len(high), dtype=np.bool_)
    marks[order[1:][equal]] = True
    return marks


class KeyIndex:
    """Finds keys among sorted 128-bit keys, each with a number as its value."""

    def __init__(self, high: Words, low: Words, values: npt.NDArray[np.int64]) -> None:
        order = np.lexsort((low, high))
        self._high, self._low, self.values = high[order], low[order], values[order]

    def __len__(self) -> int:
        return len(self._high)

    def find(self, high: Words, low: Words) -> npt.NDArray[np.int64]:
        """The value of each key; -1 where it is not here. Equal keys: the value of one of them."""
        found = np.full(len(high), -1, dtype=np.int64)
        rows, at = np.arange(len(high)), np.searchsorted(self._high, high)
        # Different keys with the same high half are next to each other: for each of those asked for, until its own
        # comes or another half. So a key that is here a thousand times costs those alone that begin as it does.
        while True:
            alike = at < len(self)
            alike[alike] = self._high[at[alike]] == high[rows[alike]]
            rows, at = rows[alike], at[alike]
            if not len(rows):
                return found
            hit = self._low[at] == low[rows]
            found[rows[hit]] = self.values[at[hit]]
            rows, at = rows[~hit], at[~hit] + 1

    def kept(self, mask: npt.NDArray[np.bool_]) -> KeyIndex:
        """The index without the entries where ``mask`` is false; ``mask`` goes with ``values``."""
        index = KeyIndex.__new__(KeyIndex)
        index._high, index._low, index.values = self._high[mask], self._low[mask], self.values[mask]
        return index

    def merged(self, others: Sequence[KeyIndex]) -> KeyIndex:
        """One index with the entries of all."""
        parts = [self, *others]
        return KeyIndex(
            np.concatenate([part._high for part in parts]),
            np.concatenate([part._low for part in parts]),
            np.concatenate([part.values for part in parts]),
        )


def index_of(keys: pa.Array | pa.ChunkedArray, value: int | None = None) -> KeyIndex:
    """Indexes keys by their position, or all under one ``value``."""
    high, low = to_words(keys)
    positions = np.arange(len(high), dtype=np.int64)
    return KeyIndex(high, low, positions if value is None else np.full(len(high), value, dtype=np.int64))


def num_repeated(keys: pa.Array, among: pa.Array) -> int:
    """How many of the keys, each of which is there once, stand more than once among others."""
    again = duplicates(among)
    return int((index_of(among.filter(pa.array(again))).find(*to_words(keys)) >= 0).sum()) if again.any() else 0


def text_digests(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Digest of each of the caller's texts (BLAKE2b, 128 bits, hexadecimal); null for null."""
    digests = [None if text is None else digest_of(text) for text in texts.to_pylist()]
    return pa.array(digests, pa.string())


def asked_of(shared: Sequence[str], own: Sequence[str] | None) -> list[str]:
    """The questions that are asked of an image: those of the job, then its own, each once."""
    return list(dict.fromkeys([*shared, *(own or ())]))


def questions_digests(own: pa.Array | pa.ChunkedArray, shared: Sequence[str]) -> pa.Array:
    """Digest of the questions that are asked of each image; never null.

    Args:
        own: lists of each image's own questions; null: it has none.
        shared: asked of every image.
    """
    if own.null_count == len(own):  # common, and nothing to be hashed row by row
        return pa.repeat(pa.scalar(digest_of(*asked_of(shared, None))), len(own))
    return pa.array([digest_of(*asked_of(shared, questions)) for questions in own.to_pylist()], pa.string())


def digest_of(*parts: str) -> str:
    """BLAKE2b of the parts, 128 bits in hexadecimal. Their lengths count: ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _value_bytes(ids: pa.Array) -> npt.NDArray[np.uint8]:
    """The characters of strings of 32 bytes each, as (N, 32) uint8."""
    if len(ids) == 0:
        return np.empty((0, _HEX_DIGITS), np.uint8)
    offsets, data = ids.buffers()[1], ids.buffers()[2]
    start = int(np.frombuffer(offsets, np.int32)[ids.offset])
    characters = np.frombuffer(data, np.uint8, count=_HEX_DIGITS * len(ids), offset=start)
    return characters.reshape(-1, _HEX_DIGITS)


def _hex_to_bytes(characters: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    nibbles = _NIBBLES[characters]
    wrong = (nibbles == 255).any(axis=1)
    if wrong.any():
        bad = characters[int(np.argmax(wrong))].tobytes().decode("utf-8", "replace")
        raise _no_id(bad)
    return np.left_shift(nibbles[:, 0::2], 4, dtype=np.uint8) | nibbles[:, 1::2]


def _no_id(found: str | None) -> CatalogError:
    return CatalogError(
        f"image_id {found!r} is not {_HEX_DIGITS} hexadecimal digits",
        remedy="vlmflow makes ids of addresses. Where a row of the catalog has another, delete it, by what wrote it.",
    )
