"""Features of contrastive spaces as vectors and cosines, in float32 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity, normalize

TEXTS_AT_ONCE = 256  # a policy can have thousands of prompts


def to_unit(features: torch.Tensor) -> NDArray[np.float32]:
    """(N, D) -> (N, D) of unit length."""
    vectors: NDArray[np.float32] = normalize(features.float(), dim=-1).cpu().numpy()
    return vectors


def cosines(first: torch.Tensor, second: torch.Tensor) -> NDArray[np.float32]:
    """(N, D) and (N, D) -> (N,)."""
    values: NDArray[np.float32] = cosine_similarity(first.float(), second.float(), dim=-1).cpu().numpy()
    return values
