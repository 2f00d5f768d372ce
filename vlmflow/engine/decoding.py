"""The CPU stage before the pools: references in, facts and pixels out, each image read and decoded once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from ray.util import get_node_ip_address

from vlmflow import schema
from vlmflow.catalog import KnownBytes
from vlmflow.config import MIB, ImageLimits
from vlmflow.engine import columns
from vlmflow.engine.equal_bytes import COPIED_TYPE, Copies, Copy, look_up
from vlmflow.engine.stored import Stored
from vlmflow.engine.watchdog import at_most
from vlmflow.errors import ImageError, RowErrorClass, StoreLostError
from vlmflow.imaging import DECODER_VERSION, ImageFacts, PixelRequest, decode, hash_of
from vlmflow.imaging.jpeg import EncodedJpeg, leave_encoded
from vlmflow.imaging.resizing import Pixels, hurried
from vlmflow.sources import Fetched, Reader
from vlmflow.sources.regions import RegionReader

# Of files that are known to be large, as videos are, no more lie in memory at a time; what is decoded is small. Of urls
# and cells of Parquet files no size is known.
_READ_AT_ONCE_BYTES = 512 * MIB
# Stores have time limits and retries of their own, each image several minutes' worth: this is for what they miss.
_MAX_READ_S = 1800.0
# Beyond Ray's workers, which have a niceness of 15.
_NICER = 4


@dataclass(frozen=True)
class PoolDecoding:
    """What a pool must know that decodes the JPEGs which the processors left encoded."""

    requests: tuple[PixelRequest, ...]  # of all pools
    limits: ImageLimits


@cache
def give_way() -> None:
    """Lets pools have the cores before this process, which decodes for them: once, and for as long as it lives.

    For pools with a GPU: a thread that feeds one must not wait for its turn among all that decode, of which there are
    more than cores; see `benchmarks.crowded_cores`. Where models run on the same cores, nothing is gained by it, and
    what else runs there would leave decoding next to nothing.
    """
    os.nice(_NICER)


@dataclass(frozen=True)
class ReadAndDecode:
    """Reads the references of a batch and decodes them to the pixels that the models need.

    A plain object called in Ray tasks: it holds settings only, clients are opened where it runs.

    Attributes:
        regions: of the caller; None: no model reads them.
        known: results that the catalog holds for equal bytes; such images are not decoded. None: none are looked for.
        leaves_jpegs: of JPEGs the facts are found here, and whether they are whole; the first pool decodes them on its
            device.
        for_gpu: a GPU waits for it; see :func:`vlmflow.imaging.resizing.hurried`.
    """

    reader: Reader
    requests: tuple[PixelRequest, ...]
    limits: ImageLimits
    known: Stored[KnownBytes] | None = None
    leaves_jpegs: bool = False
    regions: RegionReader | None = None
    for_gpu: bool = False

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds FACTS, ``errors``, what remains to be run, what need not be and, per pixel request, the pixels.

        An image that cannot be read or decoded has null facts and pixels, an error, and nothing left to run.
        """
        if batch.num_rows == 0:
            return batch
        parts = [self._read_and_decode(part) for part in _parts(batch, self.limits.max_bytes)]
        return parts[0] if len(parts) == 1 else pa.concat_tables(parts)

    def _read_and_decode(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        try:
            with at_most(_MAX_READ_S):
                fetched = self.reader.read(batch)
        except StoreLostError as error:
            return self._assemble(batch, [_Outcome() for _ in range(batch.num_rows)], None, 0.0, 0.0, str(error))
        read_s = time.perf_counter() - started
        hashes = [_hash_of(item) for item in fetched]
        run = _due(batch, hashes)
        batch = _without_captions_of_other_bytes(batch, hashes)
        copies = look_up(self.known.get(), batch, hashes, run) if self.known else None
        outcomes = [
            self._outcome(item, content_hash, tasks, copies.of(row) if copies else None)
            for row, (item, content_hash, tasks) in enumerate(zip(fetched, hashes, run, strict=True))
        ]
        decode_s = time.perf_counter() - started - read_s
        rows = self._assemble(batch, outcomes, copies, read_s, decode_s, None)
        if self.regions is None:
            return rows
        try:
            values = self.regions.read(batch, [bool(outcome.run) for outcome in outcomes])
        except StoreLostError as error:
            return self._assemble(batch, [_Outcome() for _ in range(batch.num_rows)], None, 0.0, 0.0, str(error))
        return rows.set_column(rows.schema.get_field_index(columns.REGIONS), columns.REGIONS, values)

    def failed(self, batch: pa.Table, error_class: RowErrorClass, message: str) -> pa.Table:
        """What calling it would give if every image of the batch failed so."""
        outcome = _Outcome(error=("decode", str(error_class), message))
        return self._assemble(batch, [outcome] * batch.num_rows, None, 0.0, 0.0, None)

    def _outcome(self, fetched: Fetched, content_hash: str | None, tasks: list[str], copy: Copy | None) -> _Outcome:
        if fetched.unmodified is not None:  # planning asks for nothing else then
            return _Outcome(fetched, ImageFacts(**{name: fetched.unmodified[name] for name in schema.FACTS.names}))
        if fetched.data is None:
            return _Outcome(fetched, error=("read", str(fetched.error_class), fetched.message))
        if copy is not None and set(copy.tasks) >= set(tasks):
            return _Outcome(fetched, copy.facts, copied=copy.tasks)
        try:
            with at_most(self.limits.max_seconds), hurried() if self.for_gpu else nullcontext():
                encoded = self._left_encoded(fetched.data, content_hash)
                image = None if encoded else decode(fetched.data, self.requests, self.limits, content_hash)
        except ImageError as error:
            return _Outcome(fetched, error=("decode", str(error.error_class), str(error)))
        copied = copy.tasks if copy else ()
        left = tuple(task for task in tasks if task not in copied)
        if image is None:
            assert encoded is not None
            return _Outcome(fetched, encoded.facts, run=left, copied=copied, encoded=encoded)
        # No error of the image: it was decoded. Moderation takes it for what nobody has looked at.
        unseen = ("frames", str(RowErrorClass.FRAMES_UNSEEN), image.unseen) if image.unseen else None
        return _Outcome(fetched, image.facts, image.pixels, left, copied, unseen)

    def _left_encoded(self, data: bytes, content_hash: str | None) -> EncodedJpeg | None:
        if not self.leaves_jpegs or content_hash is None:
            return None
        return leave_encoded(data, self.requests, self.limits, content_hash)

    def _assemble(
        self,
        batch: pa.Table,
        outcomes: Sequence[_Outcome],
        copies: Copies | None,
        read_s: float,
        decode_s: float,
        fatal: str | None,
    ) -> pa.Table:
        num_rows = batch.num_rows
        read = [outcome.fetched or _UNREAD for outcome in outcomes]
        version = pa.array([item.object_version for item in read], pa.string())
        # Nothing read: the version that was listed is the one that could not be read.
        version = pa.compute.coalesce(version, batch["object_version"].combine_chunks())
        batch = batch.set_column(batch.schema.get_field_index("object_version"), "object_version", version)
        added: dict[str, pa.Array] = {
            field.name: pa.array([getattr(outcome.facts, field.name, None) for outcome in outcomes], field.type)
            for field in schema.FACTS
        }
        added["http_validator"] = pa.array([item.validator for item in read], pa.string())
        added["errors"] = pa.array([outcome.errors() for outcome in outcomes], schema.ERRORS)
        lists = pa.list_(pa.string())
        none = pa.array([[] for _ in outcomes], lists)
        added[columns.RUN_TASKS] = pa.array([outcome.run for outcome in outcomes], lists)
        added[columns.TASKS_COPIED] = pa.array([outcome.copied for outcome in outcomes], lists)
        for name in (columns.TASKS_RUN, columns.TASKS_FAILED, columns.TASKS_SHARED):
            added[name] = none
        if self.known is not None:
            copied = [bool(outcome.copied) for outcome in outcomes]
            added[columns.COPIED] = copies.column(copied) if copies else pa.nulls(num_rows, COPIED_TYPE)
            if copies:
                batch = copies.with_captions(batch)
        if self.regions is not None:
            added[columns.REGIONS] = pa.nulls(num_rows, schema.REGIONS)
        for request in self.requests:
            added |= _pixel_columns(request, outcomes)
        if self.leaves_jpegs:
            left = [outcome.encoded for outcome in outcomes]
            data = [None if jpeg is None else jpeg.data for jpeg in left]
            added[columns.ENCODED] = pa.array(data, pa.large_binary())
            turns = [None if jpeg is None else jpeg.orientation for jpeg in left]
            added[columns.ORIENTATION] = pa.array(turns, pa.int8())
            shapers = [None if jpeg is None else jpeg.shaper for jpeg in left]
            added[columns.SHAPER] = pa.array(shapers, pa.binary())
        added["bytes_read"] = pa.array([len(item.data or b"") for item in read], pa.int64())
        added[columns.UNMODIFIED] = pa.array([item.unmodified is not None for item in read])
        added[columns.seconds_column("read")] = columns.spread(read_s, num_rows)
        added[columns.seconds_column("decode")] = columns.spread(decode_s, num_rows)
        added[columns.NODE] = pa.repeat(get_node_ip_address(), num_rows)
        added[columns.DECODER_THERE] = pa.repeat(DECODER_VERSION, num_rows)
        added[columns.FATAL] = pa.repeat(pa.scalar(fatal, pa.string()), num_rows)
        for name, values in added.items():
            batch = batch.append_column(name, values)
        return batch


_UNREAD = Fetched(None, None, None, "")


@dataclass(frozen=True, slots=True)
class _Outcome:
    fetched: Fetched | None = None
    facts: ImageFacts | None = None
    pixels: dict[str, list[tuple[str, Pixels]]] | None = None
    run: tuple[str, ...] = ()  # tasks that remain
    copied: tuple[str, ...] = ()  # tasks whose results are copied
    error: tuple[str, str, str] | None = None
    encoded: EncodedJpeg | None = None

    def errors(self) -> list[dict[str, str]]:
        if self.error is None:
            return []
        stage, error_class, message = self.error
        return [{"stage": stage, "class": error_class, "message": message}]


def _parts(batch: pa.Table, max_bytes: int) -> list[pa.Table]:
    """The batch, in as many parts as keep the files of each within ``_READ_AT_ONCE_BYTES``."""
    parts, start, held = [], 0, 0
    for row, size in enumerate(batch["size_bytes"].to_pylist()):
        num_bytes = size if size is not None and size <= max_bytes else 0  # larger ones are not read
        if held + num_bytes > _READ_AT_ONCE_BYTES and row > start:
            parts.append(batch.slice(start, row - start))
            start, held = row, 0
        held += num_bytes
    return [*parts, batch.slice(start)]


def _hash_of(fetched: Fetched) -> str | None:
    if fetched.unmodified is not None:
        content_hash: str = fetched.unmodified["content_hash"]
        return content_hash
    return None if fetched.data is None else hash_of(fetched.data)


def _due(batch: pa.Table, hashes: Sequence[str | None]) -> list[list[str]]:
    """What is to be run: all that is due, less where the bytes turn out to be those the live row was made of."""
    rows = zip(
        hashes,
        batch["due"].to_pylist(),
        batch["due_if_same"].to_pylist(),
        batch["previous_hash"].to_pylist(),
        strict=True,
    )
    return [(same if found == previous else due) or [] for found, due, same, previous in rows]


def _without_captions_of_other_bytes(batch: pa.Table, hashes: Sequence[str | None]) -> pa.Table:
    """Takes captions of what the image was before: no row holds them any more, so `match` must not score them."""
    same = pa.compute.equal(pa.array(hashes, pa.string()), batch["previous_hash"])
    return columns.set_column(batch, "previous_caption", pa.compute.if_else(same, batch["previous_caption"], None))


def _pixel_columns(request: PixelRequest, outcomes: Sequence[_Outcome]) -> dict[str, pa.Array]:
    views: list[list[str] | None] = []
    buffers: list[list[bytes] | None] = []
    for outcome in outcomes:
        if outcome.pixels is None:
            views.append(None)
            buffers.append(None)
            continue
        pairs = outcome.pixels[request.key]
        views.append([view for view, _ in pairs])
        buffers.append([np.ascontiguousarray(pixels).tobytes() for _, pixels in pairs])
    return {
        f"pixels_{request.key}": pa.array(buffers, pa.list_(pa.binary())),
        f"views_{request.key}": pa.array(views, pa.list_(pa.string())),
    }
