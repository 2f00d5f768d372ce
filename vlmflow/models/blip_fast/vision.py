"""BLIP's vision tower."""

from __future__ import annotations

from typing import Any

import torch

from vlmflow.models.blocks import TOKENS_AT_ONCE, Block
from vlmflow.models.linear import PackedLinear
from vlmflow.models.pixels import PixelNormalizer


class VisionTower:
    """Pixels to features, with the weights of a ``BlipVisionModel``. N images, T tokens each, D dimensions."""

    def __init__(self, model: Any, normalize: PixelNormalizer) -> None:
        config = model.config
        self._normalize = normalize
        self._embed = model.embeddings
        self._layers = [_block(layer, config.num_attention_heads) for layer in model.encoder.layers]
        self._norm = model.post_layernorm
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self._images_at_once = max(1, TOKENS_AT_ONCE // num_tokens)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, T, D).

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        inputs = self._normalize(pixels)
        if inputs.is_cuda or len(inputs) <= self._images_at_once:
            return self._encode(inputs)
        return torch.cat([self._encode(part) for part in torch.split(inputs, self._images_at_once)])

    def _encode(self, inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._embed(inputs)
        for layer in self._layers:
            states = layer(states)
        features: torch.Tensor = self._norm(states)
        return features


def _block(layer: Any, num_heads: int) -> Block:
    return Block(
        num_heads,
        layer.layer_norm1,
        PackedLinear([layer.self_attn.qkv]),
        PackedLinear([layer.self_attn.projection]),
        layer.layer_norm2,
        PackedLinear([layer.mlp.fc1], layer.mlp.config.hidden_act),
        PackedLinear([layer.mlp.fc2]),
    )
