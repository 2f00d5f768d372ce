"""Pixels on their way into a model."""

from __future__ import annotations

import torch

from vlmflow.models.preprocessing import Preprocessing


class PixelNormalizer:
    """Turns uint8 pixels into a model's input, a whole batch at once, on the model's device."""

    def __init__(self, preprocessing: Preprocessing, device: str, dtype: torch.dtype) -> None:
        std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
        mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._scale = (1 / (255 * std)).to(device)
        self._shift = (-mean / std).to(device)
        self._shape = (3, preprocessing.size, preprocessing.size)
        self._device = device
        self._dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 -> the same shape, normalised in float32, then in the model's dtype.

        Raises:
            ValueError: another dtype or another size than the model's.
        """
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != self._shape:
            raise ValueError(f"pixels of {tuple(pixels.shape)} {pixels.dtype}, not (N, {self._shape}) uint8")
        return pixels.to(self._device).to(torch.float32).mul_(self._scale).add_(self._shift).to(self._dtype)


def model_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
