"""BLIP's vision tower."""

from __future__ import annotations

from typing import Any

import torch

from vlmflow.models.blocks import TOKENS_AT_ONCE, Block, Blocks
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm
from vlmflow.models.patches import PixelPatches
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.sizes import in_few_sizes


class VisionTower:
    """Pixels to features, with the weights of a ``BlipVisionModel``. N images, T tokens each, D dimensions."""

    def __init__(self, model: Any, normalize: PixelNormalizer) -> None:
        config = model.config
        self._normalize = normalize
        self._embed = model.embeddings
        is_on_gpu = model.embeddings.patch_embedding.weight.is_cuda
        self._embed_pixels = _PixelEmbeddings(model.embeddings, normalize) if is_on_gpu else None
        layers = [_block(layer, config.num_attention_heads) for layer in model.encoder.layers]
        self._layers = Blocks(layers, Norm(model.post_layernorm, model.post_layernorm.weight.dtype))
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self._images_at_once = max(1, TOKENS_AT_ONCE // num_tokens)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, T, D).

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        if self._embed_pixels is not None:
            return in_few_sizes(self._encode_pixels, pixels, self._normalize)
        parts = torch.split(self._normalize(pixels), self._images_at_once)
        features = [self._encode(self._embed(part)) for part in parts]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self._embed_pixels is not None
        return self._encode(self._embed_pixels(pixels))

    def _encode(self, states: torch.Tensor) -> torch.Tensor:
        return self._layers(states, num_kept=0)[1]


class _PixelEmbeddings:
    """A ``BlipVisionEmbeddings`` that takes pixels as they are."""

    def __init__(self, embeddings: Any, normalize: PixelNormalizer) -> None:
        self._patches = PixelPatches(embeddings.patch_embedding, normalize)
        positions = embeddings.position_embedding.detach()[0]
        self._begin = embeddings.class_embedding.detach()[0, 0] + positions[0]
        self._positions = positions[1:]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 -> (N, T, D)."""
        patches = self._patches(pixels)
        states = patches.new_empty((len(patches), 1 + patches.shape[1], patches.shape[2]))
        states[:, 0] = self._begin
        torch.add(patches, self._positions, out=states[:, 1:])
        return states


def _block(layer: Any, num_heads: int) -> Block:
    norms = [Norm(norm, norm.weight.dtype) for norm in (layer.layer_norm1, layer.layer_norm2)]
    return Block(
        num_heads,
        norms[0],
        PackedLinear([layer.self_attn.qkv]),
        PackedLinear([layer.self_attn.projection]),
        norms[1],
        PackedLinear([layer.mlp.fc1], layer.mlp.config.hidden_act),
        PackedLinear([layer.mlp.fc2]),
    )
