"""One vector for each view of an image."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vlmflow.imaging import PixelRequest
from vlmflow.models import ImageEmbedder
from vlmflow.models.unit import check_unit
from vlmflow.tasks import Columns
from vlmflow.tasks.pixels import all_views, pixel_columns

VECTORS: pa.DataType = pa.list_(pa.list_(pa.float32()))


class EmbedTask:
    """Embeds all views of all rows in one batch of the model."""

    name = "embed"
    writes = pa.schema([("vectors", VECTORS), ("vector_views", pa.list_(pa.string()))])

    def __init__(self, embedder: ImageEmbedder, request: PixelRequest) -> None:
        self._embedder = embedder
        self._request = request
        self.reads: tuple[str, ...] = pixel_columns(request)

    def __call__(self, batch: pa.Table) -> Columns:
        """Vectors of unit length, in the order of the views.

        Raises:
            ValueError: the model gave something other than a unit vector for each view.
        """
        pixels, offsets = all_views(batch, self._request)
        vectors = self._embedder.embed_images(pixels)
        # Such a vector would be stored as an embedding and searched for ever after.
        check_unit(vectors, (len(pixels), self._embedder.dim))
        inner = pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32())
        flat = pa.ListArray.from_arrays(inner, pa.array(vectors.ravel(), pa.float32()))
        views = batch[pixel_columns(self._request)[1]].combine_chunks()
        return {
            "vectors": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat),
            "vector_views": views.cast(pa.list_(pa.string())),
        }
