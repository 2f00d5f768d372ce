"""A batch's pixels on their way to a pool's device, made ready while the batch before it is still computed."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vlmflow import schema
from vlmflow.device_errors import is_out_of_memory, release_memory
from vlmflow.engine import columns
from vlmflow.engine.decoding import PoolDecoding
from vlmflow.engine.streams import ThreadStreams
from vlmflow.engine.watchdog import at_most
from vlmflow.errors import ImageError
from vlmflow.imaging import ImageFacts, PixelRequest, decode
from vlmflow.imaging.device import DeviceDecoder, DeviceImage
from vlmflow.imaging.jpeg import EncodedJpeg
from vlmflow.imaging.resizing import hurried
from vlmflow.tasks.held import HELD_ROW, HeldViews, holding
from vlmflow.tasks.pixels import to_tensor

logger = logging.getLogger("vlmflow")


@dataclass(frozen=True)
class Fed:
    """A batch that is ready for the tasks.

    Attributes:
        batch: without pixels; ``held_row`` tells the tasks where theirs are.
        views: by the keys of the requests of this pool's tasks.
        passed_on: pixel columns for the pools behind this one.
        seconds: of making it ready.
        num_refused: JPEGs left to the device that it did not decode, for want of memory or as damaged.
    """

    batch: pa.Table
    views: dict[str, HeldViews]
    passed_on: dict[str, pa.Array]
    seconds: float
    num_refused: int


class Feeder:
    """Gets the pixels of batches onto the device; may be called by a thread beside the one that computes.

    Args:
        own: what this pool's tasks are shown.
        later: what those of the pools behind it are.
        decoding: None: every image has been decoded.
    """

    def __init__(
        self,
        own: Sequence[PixelRequest],
        later: Sequence[PixelRequest],
        device: str,
        decoding: PoolDecoding | None = None,
    ) -> None:
        self._own = {request.key: request for request in own}
        self._later = {request.key: request for request in later}
        self._device = torch.device(device)
        self._decoding = decoding
        self._decoder = None if decoding is None else DeviceDecoder(decoding.requests, device)
        # Its kernels are few and small: they go before those of the models, which would hold up the next batch.
        self._streams = ThreadStreams(device, priority=-1)

    def __call__(self, batch: pa.Table) -> Fed:
        """Decodes what is left to decode, and moves the pixels of all rows to the device."""
        started = time.perf_counter()
        with self._streams():  # waits in the thread that feeds: the one that computes never waits for a copy
            batch, decoded, num_refused = self._decode(batch)
            views = {key: self._views(batch, request, decoded) for key, request in self._own.items()}
            passed_on = {key: _passed_on(batch, request, decoded) for key, request in self._later.items()}
        batch = columns.drop_pixels(batch)
        held_row = pa.array(np.arange(batch.num_rows))
        seconds = time.perf_counter() - started
        return Fed(batch.append_column(HELD_ROW, held_row), views, passed_on, seconds, num_refused)

    @contextmanager
    def lent(self, fed: Fed) -> Iterator[None]:
        """Lets the tasks of this thread use the pixels."""
        if self._device.type == "cuda":
            for views in fed.views.values():  # not to be overwritten by the next batch before the tasks are done
                if views.pixels.is_cuda:
                    views.pixels.record_stream(torch.cuda.current_stream())
        with holding(fed.views):
            yield

    def finish(self, batch: pa.Table, fed: Fed) -> pa.Table:
        """The batch behind the tasks, with the pixels of the pools to come."""
        batch = columns.drop_views(batch.drop_columns([HELD_ROW]), kept=self._later)
        for key, values in fed.passed_on.items():
            batch = batch.append_column(columns.PIXELS_PREFIX + key, values)
        return batch

    def _decode(self, batch: pa.Table) -> tuple[pa.Table, dict[int, DeviceImage], int]:
        """The batch with views and errors of the JPEGs that were left encoded; their pixels by row; how many were
        refused.
        """
        if self._decoder is None or self._decoding is None or columns.ENCODED not in batch.column_names:
            return batch, {}, 0
        rows = pc.indices_nonzero(pc.is_valid(batch[columns.ENCODED])).to_pylist()
        files = _encoded(batch, rows)
        with at_most(self._decoding.limits.max_seconds * max(1, len(files))):
            images = self._decoder(files)
        found: dict[int, DeviceImage] = {}
        failed: dict[int, ImageError] = {}
        for row, file, image in zip(rows, files, images, strict=True):
            try:
                found[row] = image or self._decode_on_processor(file)
            except ImageError as error:
                failed[row] = error
        for key in {request.key for request in self._decoding.requests}:
            batch = _with_views(batch, key, found)
        return (_without_failed(batch, failed) if failed else batch), found, images.count(None)

    def _decode_on_processor(self, file: EncodedJpeg) -> DeviceImage:
        """What the device refused.

        Raises:
            ImageError: it cannot be decoded here either.
        """
        assert self._decoding is not None
        requests, limits = self._decoding.requests, self._decoding.limits
        with at_most(limits.max_seconds), hurried():
            image = decode(bytes(file.data), requests, limits, file.facts.content_hash)
        stacks = {key: np.stack([pixels for _, pixels in views]) for key, views in image.pixels.items()}
        pixels = {key: torch.from_numpy(stack) for key, stack in stacks.items()}
        names = {key: [name for name, _ in views] for key, views in image.pixels.items()}
        return DeviceImage(pixels, names)

    def _views(self, batch: pa.Table, request: PixelRequest, decoded: dict[int, DeviceImage]) -> HeldViews:
        column = batch[columns.PIXELS_PREFIX + request.key].combine_chunks()
        counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0), np.int64).copy()
        starts = np.cumsum(counts) - counts
        flat = pc.list_flatten(column)
        parts = [to_tensor(flat, request.size)] if len(flat) else []
        total = len(flat)
        for row, image in decoded.items():
            views = image.pixels[request.key]
            starts[row], counts[row] = total, len(views)
            total += len(views)
            parts.append(views.permute(0, 3, 1, 2))
        if not parts:
            parts.append(torch.empty((0, 3, request.size, request.size), dtype=torch.uint8))
        return HeldViews(self._together(parts), starts, counts)

    def _together(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor on the device; where its memory runs out on the processor's, and the tasks take it in pieces."""
        try:
            moved = [self._moved(part) for part in parts]
            return moved[0] if len(moved) == 1 else torch.cat(moved)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("no memory left on the device for %d images at once", sum(len(part) for part in parts))
        release_memory()  # past the handler, whose traceback kept what had been moved
        return torch.cat([part.cpu() for part in parts])

    def _moved(self, part: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda" or part.is_cuda:
            return part
        return part.pin_memory().to(self._device, non_blocking=True)


def _encoded(batch: pa.Table, rows: Sequence[int]) -> list[EncodedJpeg]:
    facts = batch.select(schema.FACTS.names).take(pa.array(rows, pa.int64())).to_pylist()
    orientations = batch[columns.ORIENTATION].to_pylist()
    files = [data for chunk in batch[columns.ENCODED].chunks for data in _without_copies(chunk)]
    shapers = batch[columns.SHAPER].to_pylist()
    pairs = zip(rows, facts, strict=True)
    return [EncodedJpeg(files[row], ImageFacts(**values), orientations[row], shapers[row]) for row, values in pairs]


def _without_copies(values: pa.LargeBinaryArray) -> list[memoryview]:
    """Views of the values in the array's own memory, of nothing for nulls: copies would hold all other threads up."""
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1].tolist()
    whole = memoryview(data if data is not None else b"")
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def _passed_on(batch: pa.Table, request: PixelRequest, decoded: dict[int, DeviceImage]) -> pa.Array:
    """The pixel column of a request, with those of the images that were decoded here."""
    column = batch[columns.PIXELS_PREFIX + request.key].combine_chunks()
    if not decoded:
        return column
    stack = torch.cat([image.pixels[request.key].cpu() for image in decoded.values()]).numpy()
    num_bytes = request.size * request.size * 3
    offsets = np.arange(len(stack) + 1, dtype=np.int64) * num_bytes
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(stack))]
    views = pa.Array.from_buffers(pa.large_binary(), len(stack), buffers).cast(pa.binary())
    ends = np.cumsum([0, *(len(image.pixels[request.key]) for image in decoded.values())])
    ours = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), views)
    places = np.arange(batch.num_rows)
    places[list(decoded)] = batch.num_rows + np.arange(len(decoded))
    return pa.concat_arrays([column, ours]).take(pa.array(places))


def _with_views(batch: pa.Table, key: str, decoded: dict[int, DeviceImage]) -> pa.Table:
    name = columns.VIEWS_PREFIX + key
    values = batch[name].to_pylist()
    for row, image in decoded.items():
        values[row] = image.views[key]
    return columns.set_column(batch, name, pa.array(values, batch.schema.field(name).type))


def _without_failed(batch: pa.Table, failed: dict[int, ImageError]) -> pa.Table:
    """The rows that cannot be decoded as the stage before the pools would have left them."""
    num_rows = batch.num_rows
    is_failed = np.zeros(num_rows, bool)
    is_failed[list(failed)] = True
    kept = pa.array(np.arange(num_rows), mask=is_failed)
    for name in (*schema.FACTS.names, columns.COPIED):
        if name in batch.column_names:
            batch = columns.set_column(batch, name, batch[name].combine_chunks().take(kept))
    for name in (columns.RUN_TASKS, columns.TASKS_COPIED):
        values = [[] if row in failed else tasks for row, tasks in enumerate(batch[name].to_pylist())]
        batch = columns.set_column(batch, name, pa.array(values, batch.schema.field(name).type))
    additions: list[list[object]] = [[] for _ in range(num_rows)]
    for row, error in failed.items():
        additions[row] = [{"stage": "decode", "class": str(error.error_class), "message": str(error)}]
    return columns.append_to_lists(batch, "errors", additions)
