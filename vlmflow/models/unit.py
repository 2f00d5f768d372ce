"""What an embedder must give, as those see it who have no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Of the length of a unit vector. Those that a model made in half precision are scaled in float32.
_TOLERANCE = 1e-3


def check_unit(vectors: NDArray[np.float32], shape: tuple[int, int]) -> None:
    """Makes sure that an embedder gave as many unit vectors as it was to.

    Args:
        vectors: (N, D), if all is well.
        shape: N and D, as they should be.

    Raises:
        ValueError: it gave others, vectors that are not finite, or of another length than 1.
    """
    found = tuple(np.shape(vectors))
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32 or found != shape:
        kind = vectors.dtype if isinstance(vectors, np.ndarray) else type(vectors).__name__
        raise ValueError(f"the model gave vectors of shape {found} ({kind}), not {shape} (float32)")
    if not np.isfinite(vectors).all():
        raise ValueError("the model gave a vector that is not finite")
    lengths = np.linalg.norm(vectors, axis=1)
    if len(lengths) and abs(lengths - 1).max() > _TOLERANCE:
        raise ValueError(f"the model gave a vector of length {lengths[abs(lengths - 1).argmax()]:.3g}, not 1")
