"""Attention of texts to images: of short texts without keys and values of the images, of long ones with them.

A head's score of a token is ``q . (W_k x)``, which is ``(W_k^T q) . x``; and what it gives is ``W_v`` of a mean of the
tokens, weighed by the scores (the weights are absorbed into the queries, as in DeepSeek-V2, arXiv:2405.04434, section
2.1). So queries are taken to the features' space, and their means back; a key's bias is the same for all tokens, and
softmax does not see it; a value's bias comes out whole.

What that saves in BLIP-base, for an image: 16 GFLOP of keys and values in each tower of texts (that of images has
110), and the 21 MB in bfloat16 to keep them in, all of which every token that is decoded reads; features are 0.9 MB,
read once a layer. What it costs: a query of a head attends in 768 dimensions where it had 64. So from some number of
tokens on, beams counted, a layer makes keys and values after all, for itself alone: none are kept for the next.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vlmflow.models.attention import attend, growing, split_heads
from vlmflow.models.fused import attempt, can_fuse
from vlmflow.models.linear import PackedLinear, multiply
from vlmflow.models.norm import Carried, Norm
from vlmflow.models.pixels import gpu_has_bfloat16

# The kernel holds the means of some queries in registers.
_MAX_FUSED_WIDTH = 1024
# Of a text at once: the scores of 256 tokens would take 7 MB an image.
_TOKENS_AT_ONCE = 32
_TOKENS_AT_ONCE_BY_KEYS = 128
# From so many tokens of an image on, keys and values take less time: by operations from as many as a head has
# dimensions, which is 64, and in bfloat16 as measured on a processor. In float32 the break-even is at 27 there, since
# packed weights are multiplied at twice the speed of batches of products.
_MANY = 64
_MANY_IN_FLOAT32 = 32
# On CUDA in half precision as `benchmarks.gpu_pool` found it on an H200, for 256 images: keys and values take 0.75 ms
# whatever the number of tokens up to 64; by the features it is 0.55 ms for 8 tokens, 1.05 for 16 and 1.56 for 24.
_MANY_IN_HALF_ON_CUDA = 12


class CrossAttention:
    """Of N texts of L tokens and D dimensions, with H heads of d, to the T tokens of E dimensions of an image each."""

    def __init__(self, layer: Any, num_heads: int, image_dtype: torch.dtype | None) -> None:
        """Takes over the weights.

        Args:
            layer: a ``BlipTextAttention`` to images.
            num_heads: H.
            image_dtype: of the features, and of the products with them; None: that of the weights.
        """
        query, key, value = layer.self.query, layer.self.key, layer.self.value
        dtype = image_dtype or query.weight.dtype
        heads = (num_heads, query.out_features // num_heads, key.in_features)
        self._query = PackedLinear([query])
        self._to_features = (key.weight.detach().float().view(heads) * heads[1] ** -0.5).to(dtype)  # (H, d, E)
        self._from_features = value.weight.detach().view(heads).transpose(1, 2).to(dtype)  # (H, E, d)
        self._out = PackedLinear([layer.output.dense], shift=value.bias)
        self._norm = Norm(layer.output.LayerNorm)

    def __call__(self, carried: Carried, features: torch.Tensor) -> Carried:
        """(N, L, D) and (N, T, E) in the images' dtype -> (N, L, D), the normalised sum."""
        queries = self._query(carried.rounded).to(features.dtype)
        attend_by = self.by_keys if queries.shape[1] >= _many(features) else self.by_features
        return self._norm.carried(carried.states, self._out(attend_by(queries, features)), carried.rounded.dtype)

    def by_features(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(N, L, H d) and (N, T, E), of one dtype -> (N, L, H d), without the values' bias."""
        parts = [self._by_features(part, features) for part in torch.split(queries, _TOKENS_AT_ONCE, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _by_features(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        num_heads, head_dim = self._to_features.shape[:2]
        by_head = queries.reshape(-1, num_heads, head_dim).transpose(0, 1)
        means = attend_to_features(torch.bmm(by_head, self._to_features), features)
        return torch.bmm(means, self._from_features).transpose(0, 1).reshape(queries.shape)

    def by_keys(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """As :meth:`by_features`, with keys and values of the images."""
        num_heads = len(self._to_features)
        weights = self._to_features, self._from_features.transpose(1, 2)
        keys, values = (split_heads(multiply(features, of.flatten(0, 1)), num_heads, 1)[0] for of in weights)
        by_head = torch.split(split_heads(queries, num_heads, 1)[0], _TOKENS_AT_ONCE_BY_KEYS, dim=2)
        with growing(features.device):
            parts = [attend(part, keys, values, scale=1.0) for part in by_head]  # the keys' weights are scaled
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@cache
def _gpu_is_new() -> bool:
    """Whether it can run the kernel: others lack the shared memory, which Triton says after half a minute's work."""
    return gpu_has_bfloat16()


def _many(features: torch.Tensor) -> int:
    if features.is_cuda:
        return _MANY if features.dtype == torch.float32 else _MANY_IN_HALF_ON_CUDA
    return _MANY_IN_FLOAT32 if features.dtype == torch.float32 else _MANY


def attend_to_features(queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Means of an image's tokens, weighed by the softmax of their products with the queries.

    Args:
        queries: (H, N L, E): L of each of N images, image by image; scaled.
        features: (N, T, E), of the same dtype.

    Returns:
        (H, N L, E).
    """
    is_small = queries.dtype == torch.bfloat16 and queries.shape[-1] <= _MAX_FUSED_WIDTH
    if is_small and can_fuse(queries, features) and _gpu_is_new():
        from vlmflow.models import triton_attention

        means = attempt(triton_attention.attend_to_features, queries, features)
        if means is not None:
            return means
    num_heads, num_images = len(queries), len(features)
    by_image = queries.view(num_heads, num_images, -1, queries.shape[-1]).transpose(0, 1)
    by_image_and_row, keys = by_image.flatten(1, 2), features.transpose(1, 2)
    if features.is_cuda and features.dtype != torch.float32:
        # A score of 30 would be off by up to 0.06 in bfloat16; kernels round none either.
        scores = torch.bmm(by_image_and_row, keys, out_dtype=torch.float32)
    else:
        scores = torch.bmm(by_image_and_row, keys)
    by_image = torch.bmm(scores.softmax(dim=-1).to(features.dtype), features).view_as(by_image)
    return by_image.transpose(0, 1).reshape(queries.shape)
