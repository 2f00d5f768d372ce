"""Pixel columns as tensors, without a copy where Arrow's memory allows it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from vlmflow.imaging import PixelRequest
from vlmflow.tasks.held import held_views


def pixel_columns(request: PixelRequest) -> tuple[str, str]:
    """Names the columns with the pixels of a request and with the names of their views."""
    return f"pixels_{request.key}", f"views_{request.key}"


def all_views(batch: pa.Table, request: PixelRequest) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Every view of every row: those held on the device, else those of the batch's own column.

    Returns:
        (V, 3, S, S) uint8 of all views, row by row; and (N + 1,) int64, where each row's views begin.

    Raises:
        ValueError: a row has no pixels, or not those of the size requested.
    """
    held = held_views(batch, request.key)
    if held is not None:
        return held
    column = batch[pixel_columns(request)[0]].combine_chunks()
    counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0), np.int64)
    if len(counts) and counts.min() == 0:
        raise ValueError(f"row {int(counts.argmin())} of the batch has no pixels")
    return to_tensor(pc.list_flatten(column), request.size), np.concatenate([[0], np.cumsum(counts)])


def first_views(batch: pa.Table, request: PixelRequest) -> torch.Tensor:
    """(N, 3, S, S) uint8: the first view of each row, which shows the whole image.

    Raises:
        ValueError: a row has no pixels, or not those of the size requested.
    """
    pixels, offsets = all_views(batch, request)
    if len(pixels) == batch.num_rows:
        return pixels
    return pixels[torch.from_numpy(offsets[:-1]).to(pixels.device)]


def to_tensor(images: pa.Array[Any], size: int) -> torch.Tensor:
    """HWC buffers -> (V, 3, S, S) uint8, in channels-last order.

    Raises:
        ValueError: a buffer is not of the size requested.
    """
    num_bytes = size * size * 3
    lengths = np.asarray(pc.binary_length(cast(pa.BinaryArray, images)))
    # A null has no length: it compares unequal too.
    wrong = lengths[lengths != num_bytes]
    if len(wrong):
        raise ValueError(f"pixels of {wrong[0]} bytes, not {size} x {size} x 3")
    _, starts, values = images.buffers()
    assert starts is not None
    assert values is not None
    first = int(np.frombuffer(memoryview(starts), np.int32)[images.offset]) if len(images) else 0
    flat = np.frombuffer(memoryview(values), np.uint8, count=len(images) * num_bytes, offset=first)
    # torch takes no read-only memory, which is what a Ray worker gets.
    pixels = torch.from_numpy(np.require(flat, requirements="W").reshape(len(images), size, size, 3))
    return pixels.permute(0, 3, 1, 2)
