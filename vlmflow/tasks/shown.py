"""What a model is shown of an image: its pixels, or regions that the source has of it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from vlmflow.imaging import PixelRequest
from vlmflow.models.vilbert.regions import pad_regions
from vlmflow.tasks.pixels import first_views, pixel_columns

REGIONS_COLUMN = "regions_of_source"  # of schema.REGIONS


def shown_column(request: PixelRequest | None) -> str:
    """Names the column that :func:`shown` reads."""
    return REGIONS_COLUMN if request is None else pixel_columns(request)[0]


def shown(batch: pa.Table, request: PixelRequest | None) -> torch.Tensor:
    """The first view of each row, (N, 3, S, S) uint8.

    Without a request :class:`Regions` of each row, typed as what every other model takes: no other is given them.

    Raises:
        ValueError: a row has neither, or what it has does not fit together.
    """
    if request is not None:
        return first_views(batch, request)
    column = batch[REGIONS_COLUMN].combine_chunks()
    parts = [_regions(column[row]) for row in range(len(column))]
    if len({features.shape[1] for features, _ in parts}) > 1:
        raise ValueError("regions of different numbers of features")
    return cast(torch.Tensor, pad_regions([features for features, _ in parts], [boxes for _, boxes in parts]))


def _regions(value: pa.StructScalar) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, F) features and (R, 4) boxes as parts of the image."""
    if not value.is_valid or not all(part.is_valid for part in value.values()):
        raise ValueError("the source has no regions of this image")
    features, boxes = _matrix(value["features"].values), _matrix(value["boxes"].values)
    if not len(features) or boxes.shape != (len(features), 4):
        raise ValueError(f"regions with features of shape {features.shape} and boxes of shape {boxes.shape}")
    width, height = value["width"].as_py(), value["height"].as_py()
    if not (width > 0 and height > 0 and np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise ValueError("regions with numbers that are not finite, or of an image without a size")
    shares = np.clip(boxes / np.array([width, height, width, height], np.float32), 0, 1)
    return torch.from_numpy(features), torch.from_numpy(shares)


def _matrix(lists: pa.Array[Any]) -> NDArray[np.float32]:
    """Lists of one length, as rows; without a Python object for each of their numbers."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), -1))
    if len(set(lengths.tolist())) > 1:
        raise ValueError("regions whose features or boxes differ in length")
    flat = np.array(pc.list_flatten(lists), np.float32)  # a copy: torch wants memory that it could write to
    return flat.reshape(len(lists), -1) if len(flat) else np.empty((0, 0), np.float32)
