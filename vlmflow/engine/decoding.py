"""The CPU stage before the pools: references in, facts and pixels out, each image read and decoded once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vlmflow import schema
from vlmflow.config import ImageLimits
from vlmflow.engine import columns
from vlmflow.engine.watchdog import at_most
from vlmflow.errors import ImageError, RowErrorClass, StoreLostError
from vlmflow.imaging import DecodedImage, PixelRequest, decode
from vlmflow.sources import Fetched, Reader

# Stores have time limits and retries of their own, each image several minutes' worth: this is for what they miss.
_MAX_READ_S = 1800.0


@dataclass(frozen=True)
class ReadAndDecode:
    """Reads the references of a batch and decodes them to the pixels that the models need.

    A plain object called in Ray tasks: it holds settings only, clients are opened where it runs.
    """

    reader: Reader
    requests: tuple[PixelRequest, ...]
    limits: ImageLimits

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds FACTS, ``errors``, what remains to be run and, per pixel request, the pixels.

        An image that cannot be read or decoded has null facts and pixels, an error, and nothing left to run.
        """
        if batch.num_rows == 0:
            return batch
        started = time.perf_counter()
        try:
            with at_most(_MAX_READ_S):
                fetched = self.reader.read(batch)
        except StoreLostError as error:
            return self._assemble(batch, [_Outcome.lost() for _ in range(batch.num_rows)], 0.0, 0.0, str(error))
        read_s = time.perf_counter() - started
        outcomes = [self._decode(item) for item in fetched]
        decode_s = time.perf_counter() - started - read_s
        return self._assemble(batch, outcomes, read_s, decode_s, None)

    def failed(self, batch: pa.Table, error_class: RowErrorClass, message: str) -> pa.Table:
        """What calling it would give if every image of the batch failed so."""
        outcome = _Outcome(None, 0, None, ("decode", str(error_class), message))
        return self._assemble(batch, [outcome] * batch.num_rows, 0.0, 0.0, None)

    def _decode(self, fetched: Fetched) -> _Outcome:
        if fetched.data is None:
            error = ("read", str(fetched.error_class), fetched.message)
            return _Outcome(fetched.object_version, 0, None, error)
        try:
            with at_most(self.limits.max_seconds):
                image = decode(fetched.data, self.requests, self.limits)
        except ImageError as error:
            reason = ("decode", str(error.error_class), str(error))
            return _Outcome(fetched.object_version, len(fetched.data), None, reason)
        return _Outcome(fetched.object_version, len(fetched.data), image, None)

    def _assemble(
        self, batch: pa.Table, outcomes: Sequence[_Outcome], read_s: float, decode_s: float, fatal: str | None
    ) -> pa.Table:
        num_rows = batch.num_rows
        version = pa.array([outcome.object_version for outcome in outcomes], pa.string())
        # Nothing read: the version that was listed is the one that could not be read.
        version = pa.compute.coalesce(version, batch["object_version"].combine_chunks())
        batch = batch.set_column(batch.schema.get_field_index("object_version"), "object_version", version)
        added: dict[str, pa.Array] = {
            field.name: pa.array([outcome.fact(field.name) for outcome in outcomes], field.type)
            for field in schema.FACTS
        }
        added["errors"] = pa.array([outcome.errors() for outcome in outcomes], schema.ERRORS)
        added |= _remaining(batch, outcomes)
        for request in self.requests:
            added |= _pixel_columns(request, outcomes)
        added["bytes_read"] = pa.array([outcome.num_bytes for outcome in outcomes], pa.int64())
        added[columns.seconds_column("read")] = columns.spread(read_s, num_rows)
        added[columns.seconds_column("decode")] = columns.spread(decode_s, num_rows)
        added[columns.FATAL] = pa.repeat(pa.scalar(fatal, pa.string()), num_rows)
        for name, values in added.items():
            batch = batch.append_column(name, values)
        return batch


@dataclass(frozen=True, slots=True)
class _Outcome:
    object_version: str | None
    num_bytes: int
    image: DecodedImage | None
    error: tuple[str, str, str] | None

    @classmethod
    def lost(cls) -> _Outcome:
        return cls(None, 0, None, None)

    def fact(self, name: str) -> object:
        return None if self.image is None else getattr(self.image.facts, name)

    def errors(self) -> list[dict[str, str]]:
        if self.error is None:
            return []
        stage, error_class, message = self.error
        return [{"stage": stage, "class": error_class, "message": message}]


def _remaining(batch: pa.Table, outcomes: Sequence[_Outcome]) -> dict[str, pa.Array]:
    """What is left to run: all that is due, less where the bytes turn out to be those the live row was made of."""
    lists = pa.list_(pa.string())
    run: list[list[str]] = []
    rows = zip(
        outcomes,
        batch["due"].to_pylist(),
        batch["due_if_same"].to_pylist(),
        batch["previous_hash"].to_pylist(),
        strict=True,
    )
    for outcome, due, due_if_same, previous_hash in rows:
        if outcome.image is None:
            run.append([])
        elif outcome.image.facts.content_hash == previous_hash:
            run.append(due_if_same or [])
        else:
            run.append(due or [])
    empty: list[list[str]] = [[] for _ in outcomes]
    return {
        columns.RUN_TASKS: pa.array(run, lists),
        columns.TASKS_RUN: pa.array(empty, lists),
        columns.TASKS_FAILED: pa.array(empty, lists),
    }


def _pixel_columns(request: PixelRequest, outcomes: Sequence[_Outcome]) -> dict[str, pa.Array]:
    views: list[list[str] | None] = []
    buffers: list[list[bytes] | None] = []
    for outcome in outcomes:
        if outcome.image is None:
            views.append(None)
            buffers.append(None)
            continue
        pairs = outcome.image.pixels[request.key]
        views.append([view for view, _ in pairs])
        buffers.append([np.ascontiguousarray(pixels).tobytes() for _, pixels in pairs])
    return {
        f"pixels_{request.key}": pa.array(buffers, pa.list_(pa.binary())),
        f"views_{request.key}": pa.array(views, pa.list_(pa.string())),
    }
