"""What a policy's detectors find in the pixels of each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.imaging.frames import split_views
from vlmflow.models.detectors import DetectorSetup, PixelDetector
from vlmflow.tasks import Columns
from vlmflow.tasks.pixels import all_views, pixel_columns


class DetectTask:
    """Shows each detector all views; of each output the highest score is kept, and its view."""

    name = "detect"
    writes = pa.schema([("detections", pa.list_(schema.DETECTION))])

    def __init__(self, detectors: Sequence[tuple[DetectorSetup, PixelDetector]]) -> None:
        self._detectors = tuple(detectors)
        requests = {setup.request.key: setup.request for setup, _ in self._detectors}
        self.reads: tuple[str, ...] = tuple(name for request in requests.values() for name in pixel_columns(request))

    def __call__(self, batch: pa.Table) -> Columns:
        """Detector by detector and output by output, in the policy's order."""
        parts = [self._run(batch, setup, detector) for setup, detector in self._detectors]
        per_row = sum(len(setup.outputs) for setup, _ in self._detectors)
        # Part by part, each row by row: brought into the order of the rows.
        widths = [len(setup.outputs) for setup, _ in self._detectors]
        numbers = np.empty((batch.num_rows, per_row), np.int64)
        start = column = 0
        for width in widths:
            block = start + np.arange(batch.num_rows * width).reshape(batch.num_rows, width)
            numbers[:, column : column + width] = block
            start, column = start + block.size, column + width
        items = pa.concat_arrays(parts).take(pa.array(numbers.ravel()))
        offsets = pa.array(np.arange(batch.num_rows + 1) * per_row, pa.int32())
        return {"detections": pa.ListArray.from_arrays(offsets, items)}

    def _run(self, batch: pa.Table, setup: DetectorSetup, detector: PixelDetector) -> pa.StructArray:
        pixels, offsets = all_views(batch, setup.request)
        scores = detector.score(pixels)
        if scores.shape != (len(pixels), len(setup.outputs)):
            raise ValueError(f"detector {setup.name} gave scores of shape {scores.shape}")
        # A score that is no number would pass for a low one.
        if not np.isfinite(scores).all():
            raise ValueError(f"detector {setup.name} gave a score that is not finite")
        views = pc.list_flatten(batch[pixel_columns(setup.request)[1]].combine_chunks())
        worst, where = _worst(scores, offsets)
        names, times = split_views(views.cast(pa.string()))
        deciding = pa.array(where.ravel())
        count = batch.num_rows * len(setup.outputs)
        columns = {
            "detector": pa.repeat(pa.scalar(setup.name), count),
            "model": pa.repeat(pa.scalar(setup.fingerprint), count),
            "output": pa.array(list(setup.outputs) * batch.num_rows, pa.string()),
            "score": pa.array(worst.ravel(), pa.float32()),
            "view": names.take(deciding),
            "time_s": times.take(deciding),
        }
        return pa.StructArray.from_arrays(
            [columns[field.name] for field in schema.DETECTION], fields=list(schema.DETECTION)
        )


def _worst(scores: NDArray[np.float32], offsets: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(V, O) scores of views -> per image and output the highest, and the first view that has it."""
    worst = np.maximum.reduceat(scores, offsets[:-1], axis=0)
    image_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    places = np.where(scores == worst[image_of], np.arange(len(scores))[:, None], len(scores))
    return worst, np.minimum.reduceat(places, offsets[:-1], axis=0)
