"""Labels and a decision for each image, from its vectors."""

from __future__ import annotations

from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.rows import unseen_frames
from vlmflow.moderation.decide import Moderator
from vlmflow.tasks import Columns


class ModerateTask:
    """Applies a policy to vectors. A row without vectors is decided too: `review`, as unscored."""

    name = "moderate"
    reads: tuple[str, ...] = ("vectors", "vector_views")  # and `detections`, where there are detectors
    writes = pa.schema(
        [("labels", pa.list_(schema.LABEL)), ("decision", pa.string()), ("decision_reason", pa.string())]
    )

    def __init__(self, moderator: Moderator) -> None:
        self._moderator = moderator

    def __call__(self, batch: pa.Table) -> Columns:
        """The decision is never null."""
        column = batch["vectors"].combine_chunks()
        counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0), np.int64)
        flat = pc.list_flatten(column)
        values = np.asarray(pc.list_flatten(flat), np.float32)
        vectors = values.reshape(len(flat), -1) if len(flat) else np.empty((0, self._moderator.dim), np.float32)
        views = cast(list[str], pc.list_flatten(batch["vector_views"].combine_chunks()).to_pylist())
        detections = batch["detections"].combine_chunks() if "detections" in batch.column_names else None
        unseen = unseen_frames(batch["errors"]) if "errors" in batch.column_names else None
        offsets = np.concatenate([[0], np.cumsum(counts)])
        result = self._moderator.moderate(vectors, views, offsets, detections, unseen)
        return {"labels": result.labels, "decision": result.decision, "decision_reason": result.reason}
