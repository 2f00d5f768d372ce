"""The first layer of a vision transformer: a convolution whose step is its size, as one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmflow.models.linear import PackedLinear
from vlmflow.models.pixels import PixelNormalizer

# Rows of a product of half precision begin at multiples of 16 bytes, or the fast kernels do without it.
_ALIGNED = 8
_MIDDLE = 128


class Patches:
    """Of normalised pixels."""

    def __init__(self, convolution: Any) -> None:
        self._size = convolution.kernel_size[0]
        weight = convolution.weight.detach().flatten(1)
        self._project = PackedLinear([_linear(weight, convolution.bias)])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, T, D), row by row."""
        return self._project(_squares(inputs, self._size).flatten(3).flatten(1, 2))


class PixelPatches:
    """Of pixels as they are: what normalises them is folded into the product.

    Their 256 levels are exact in bfloat16, where normalised ones are rounded; the middle of them is subtracted, so that
    the rounded weights are not multiplied by something large that all pixels share.
    """

    def __init__(self, convolution: Any, normalize: PixelNormalizer, dtype: torch.dtype | None = None) -> None:
        """``convolution``: without padding. ``dtype``: of the product; None: that of the convolution."""
        weight, bias = convolution.weight.detach().float(), convolution.bias
        self._normalize = normalize
        self._size: int = convolution.kernel_size[0]
        shift = (weight * (_MIDDLE * normalize.scale + normalize.shift)).sum(dim=(1, 2, 3))
        self._num_values = weight[0].numel()
        self._padding = -self._num_values % _ALIGNED
        folded = nn.functional.pad((weight * normalize.scale).flatten(1), (0, self._padding))
        layer = _linear(folded, shift if bias is None else bias.detach().float() + shift)
        self._dtype = dtype or convolution.weight.dtype
        self._project = PackedLinear([layer], dtype=self._dtype)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, T, D), row by row.

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        self._normalize.check(pixels)
        # The highest bit turned over, a level as a signed number is itself less the middle.
        signed = pixels.to(self._normalize.device).bitwise_xor(_MIDDLE).view(torch.int8)
        squares = _squares(signed, self._size)
        rows = torch.empty(
            (*squares.shape[:3], self._num_values + self._padding), dtype=self._dtype, device=squares.device
        )
        rows[..., : self._num_values].view(squares.shape).copy_(squares)
        if self._padding:
            rows[..., self._num_values :] = 0
        return self._project(rows.flatten(1, 2))


def _squares(images: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, S, S) -> (N, S / size, S / size, 3, size, size); what is left at the edges goes, as in a convolution."""
    count = images.shape[-1] // size
    images = images[..., : count * size, : count * size]
    return images.reshape(len(images), -1, count, size, count, size).permute(0, 2, 4, 1, 3, 5)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
