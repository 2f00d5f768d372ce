"""Margins: how much nearer an image is to a label's prompts than to the neutral ones.

The one function by which a run and a backfill score, so its results must not depend on which images share a batch.
BLAS does not give that: the last bits of a matrix product change with the number of rows. Here every similarity is a
dot product computed by the same loop over the same length, in chunks of one shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlmflow.moderation.prompts import PromptVectors

SCORING_VERSION = 1  # raised by hand when margins or decisions move for equal vectors
_CHUNK_ROWS = 64


class Scorer:
    """Scores image embeddings against the prompts of a policy. N: vectors, L: labels, D: dimensions."""

    def __init__(self, prompts: PromptVectors) -> None:
        self._num_labels = len(prompts.labels)
        self._columns = np.ascontiguousarray(np.concatenate([prompts.labels, prompts.neutral]), dtype=np.float32)
        self._temperature = prompts.temperature

    def score(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Margins, bit-equal for a vector whatever the batch it comes in.

        The margin of a label is its similarity minus ``T log mean_i exp(s_i / T)`` over the similarities ``s_i`` of
        the neutral prompts: with a small temperature T, minus that of the nearest neutral prompt.

        Args:
            vectors: (N, D) unit vectors.

        Returns:
            (N, L), not a number where the vector is not finite.

        Raises:
            ValueError: the vectors have another length than the prompts.
        """
        dim = self._columns.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise ValueError(f"vectors of shape {vectors.shape} against prompts of {dim} dimensions")
        margins = np.empty((len(vectors), self._num_labels), np.float32)
        chunk = np.zeros((_CHUNK_ROWS, dim), np.float32)
        for start in range(0, len(vectors), _CHUNK_ROWS):
            rows = vectors[start : start + _CHUNK_ROWS]
            chunk[: len(rows)] = rows
            margins[start : start + len(rows)] = self._score_chunk(chunk)[: len(rows)]
        return margins

    def _score_chunk(self, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        # optimize=False keeps einsum from handing the product to BLAS.
        similarities = np.einsum("nd,cd->nc", chunk, self._columns, optimize=False).astype(np.float64)
        labels, neutral = similarities[:, : self._num_labels], similarities[:, self._num_labels :]
        highest = neutral.max(axis=1, keepdims=True)
        spread = np.exp((neutral - highest) / self._temperature).mean(axis=1, keepdims=True)
        margins: NDArray[np.float32] = (labels - (highest + self._temperature * np.log(spread))).astype(np.float32)
        return margins
