"""Pixels on their way into a model."""

from __future__ import annotations

import logging

import torch

from vlmflow.config import Dtype
from vlmflow.models.preprocessing import Preprocessing

logger = logging.getLogger("vlmflow")


class PixelNormalizer:
    """Turns uint8 pixels into a model's input, a whole batch at once, on the model's device.

    Attributes:
        scale: (1, 3, 1, 1) float32 on the device; of a level of a pixel.
        shift: likewise, what is added then.
        device: of the model.
        dtype: of what it gives, the model's.
    """

    def __init__(self, preprocessing: Preprocessing, device: str, dtype: torch.dtype) -> None:
        std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
        mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.scale = (1 / (255 * std)).to(device)
        self.shift = (-mean / std).to(device)
        self._shape = (3, preprocessing.size, preprocessing.size)
        self.device = device
        self.dtype = dtype
        self._logical, self._is_bgr = preprocessing.describe(), preprocessing.is_bgr

    def describe(self) -> str:
        """One line, equal for normalisers that give equal inputs for equal pixels."""
        return f"{self._logical} {self.device} {self.dtype}"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 -> the same shape, normalised in float32, then in the model's dtype.

        Raises:
            ValueError: another dtype or another size than the model's.
        """
        self.check(pixels)
        if self._is_bgr:
            pixels = pixels.flip(1)
        return pixels.to(self.device).to(torch.float32).mul_(self.scale).add_(self.shift).to(self.dtype)

    def check(self, pixels: torch.Tensor) -> None:
        """Makes sure that the pixels are (N, 3, S, S) uint8, S the model's size.

        Raises:
            ValueError: they are not.
        """
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != self._shape:
            raise ValueError(f"pixels of {tuple(pixels.shape)} {pixels.dtype}, not (N, {self._shape}) uint8")


def model_dtype(device: str, wanted: Dtype = "auto") -> torch.dtype:
    """The dtype wanted; `auto`: bfloat16 on a GPU that multiplies in it, float32 elsewhere."""
    on_gpu = torch.device(device).type == "cuda"
    if wanted == "auto":
        return torch.bfloat16 if on_gpu and gpu_has_bfloat16() else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    if dtype == torch.bfloat16 and not (gpu_has_bfloat16() if on_gpu else has_bfloat16()):
        what = "GPU" if on_gpu else "processor"
        logger.warning("this %s has no bfloat16 instructions: bfloat16 is emulated, and slower than float32", what)
    return dtype


def gpu_has_bfloat16() -> bool:
    """Whether the current GPU multiplies bfloat16 by itself, as those of the Ampere generation and later do."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
