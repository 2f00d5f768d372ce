"""BLIP's vision tower."""

from __future__ import annotations

from typing import Any

import torch

from vlmflow.models.blip_fast.attention import attend
from vlmflow.models.blip_fast.linear import PackedLinear
from vlmflow.models.pixels import PixelNormalizer

# Of the images that pass all layers together on a processor: what lies between two layers should stay in the cache.
_TOKENS_AT_ONCE = 1024


class VisionTower:
    """Pixels to features, with the weights of a ``BlipVisionModel``. N images, T tokens each, D dimensions."""

    def __init__(self, model: Any, normalize: PixelNormalizer) -> None:
        config = model.config
        self._normalize = normalize
        self._embed = model.embeddings
        self._layers = [_Layer(layer, config.num_attention_heads) for layer in model.encoder.layers]
        self._norm = model.post_layernorm
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self._images_at_once = max(1, _TOKENS_AT_ONCE // num_tokens)

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


class _Layer:
    """Normalise, attend, add; normalise, expand, contract, add."""

    def __init__(self, layer: Any, num_heads: int) -> None:
        self._num_heads = num_heads
        self._norm1, self._norm2 = layer.layer_norm1, layer.layer_norm2
        self._qkv = PackedLinear([layer.self_attn.qkv])
        self._projection = PackedLinear([layer.self_attn.projection])
        self._expand = PackedLinear([layer.mlp.fc1], layer.mlp.config.hidden_act)
        self._contract = PackedLinear([layer.mlp.fc2])

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(N, T, D) -> the same shape."""
        qkv = self._qkv(self._norm1(states))
        queries, keys, values = qkv.view(*qkv.shape[:2], 3, self._num_heads, -1).permute(2, 0, 3, 1, 4)
        states = states + self._projection(attend(queries, keys, values))
        return states + self._contract(self._expand(self._norm2(states)))
