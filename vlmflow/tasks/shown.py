"""What a model is shown of an image: its pixels, or regions that the source has of it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

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
    values = cast("list[dict[str, Any] | None]", batch[REGIONS_COLUMN].to_pylist())
    parts = [_regions(value) for value in values]
    if len({features.shape[1] for features, _ in parts}) > 1:
        raise ValueError("regions of different numbers of features")
    return cast(torch.Tensor, pad_regions([features for features, _ in parts], [boxes for _, boxes in parts]))


def _regions(value: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, F) features and (R, 4) boxes as parts of the image."""
    if value is None or any(part is None for part in value.values()):
        raise ValueError("the source has no regions of this image")
    try:
        features, boxes = (np.array(value[name], np.float32) for name in ("features", "boxes"))
    except ValueError as error:  # of lists that differ in length
        raise ValueError("regions whose features or boxes differ in length") from error
    if not len(features) or features.ndim != 2 or boxes.shape != (len(features), 4):
        raise ValueError(f"regions with features of shape {features.shape} and boxes of shape {boxes.shape}")
    width, height = value["width"], value["height"]
    if width <= 0 or height <= 0 or not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise ValueError("regions with numbers that are not finite, or of an image without a size")
    shares = np.clip(boxes / np.array([width, height, width, height], np.float32), 0, 1)
    return torch.from_numpy(features), torch.from_numpy(shares)
