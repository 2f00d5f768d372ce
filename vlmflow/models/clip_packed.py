"""The layers of a CLIP image tower with packed weights: equal results, less time.

On processors the weights lie as the processor reads them: ``benchmarks/clip_cpu.py`` has the figures. On CUDA what is
carried from layer to layer is in the dtype of the products, and what costs time beside them is memory traffic: sums and
norms are one pass, QuickGELU is one instead of three, and patches are made of pixels as they are. Of the last layer
only the token is computed that the vector is made of, where it is made of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import nn

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.blocks import Block, Blocks
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm
from vlmflow.models.patches import PixelPatches
from vlmflow.models.pixels import PixelNormalizer

# QuickGELU(x) = x sigmoid(c x) = SiLU(c x) / c, which is one pass; the factors go into the weights before and behind.
_QUICK = 1.702


def can_pack(model: Any) -> bool:
    """Whether the layers of the image tower are all of open_clip's ordinary kind; those of SigLIP's towers are not."""
    transformer = getattr(model.visual, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None or not getattr(transformer, "batch_first", False):
        return False
    return all(type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv") for block in blocks)


def pack_image_tower(model: Any, dtype: torch.dtype | None = None, carried: torch.dtype | None = None) -> bool:
    """Puts packed layers in the place of those of the image tower, where they :func:`can_pack`.

    Args:
        dtype: of the products; None: the model's.
        carried: of what is added up from layer to layer; None: the model's.

    Returns:
        Whether the tower is packed.
    """
    if not can_pack(model):
        return False
    visual = model.visual
    of_token_alone = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
    tower = _PackedTower(list(visual.transformer.resblocks), dtype, carried, of_token_alone=of_token_alone)
    visual.transformer.resblocks = nn.ModuleList([tower])
    if carried not in (None, torch.float32) and isinstance(visual.ln_pre, nn.LayerNorm):
        visual.ln_pre = _NormLayer(visual.ln_pre, carried)
    return True


def take_pixels(model: Any, normalize: PixelNormalizer, dtype: torch.dtype) -> None:
    """Has a packed image tower take (N, 3, S, S) uint8 pixels, where its first layer is a plain convolution."""
    convolution = model.visual.conv1
    if convolution.padding == (0, 0) and convolution.stride == convolution.kernel_size:
        model.visual.conv1 = PixelConvolution(convolution, normalize, dtype)


def takes_pixels(model: Any) -> bool:
    """Whether the image tower takes pixels as they are; else they are to be normalised."""
    return isinstance(getattr(model.visual, "conv1", None), PixelConvolution)


class _PackedTower(nn.Module):
    """All layers, as one."""

    def __init__(
        self, blocks: list[Any], dtype: torch.dtype | None, carried: torch.dtype | None, *, of_token_alone: bool
    ) -> None:
        super().__init__()
        *packed, last = (_packed(block, dtype, carried) for block in blocks)
        self._blocks, self._last = Blocks(packed, last.norm1), last
        self._of_token_alone = of_token_alone

    def forward(self, states: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, D) -> the same, or (N, 1, D) of the first token; an image tower has no mask."""
        assert attn_mask is None
        last, num_kept = self._last, 1 if self._of_token_alone else None
        states, normed = self._blocks(states, num_kept=num_kept)
        queries, keys, values = split_heads(last.project(normed), last.num_heads)
        states, added = last.finish(states, last.attention(queries[:, :, :num_kept], keys, values))
        return states + added


class PixelConvolution(nn.Module):
    """(N, 3, S, S) uint8 -> (N, D, H, W), as the convolution gives it of normalised pixels."""

    def __init__(self, convolution: nn.Conv2d, normalize: PixelNormalizer, dtype: torch.dtype) -> None:
        super().__init__()
        self._patches = PixelPatches(convolution, normalize, dtype)
        self._size = convolution.kernel_size[0]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        patches = self._patches(pixels)
        side = pixels.shape[-1] // self._size
        return patches.view(len(patches), -1, side, patches.shape[-1]).permute(0, 3, 1, 2)


class _NormLayer(nn.Module):
    """A norm as open_clip calls it."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self._norm = Norm(norm, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> the same."""
        return self._norm(x)


def _packed(block: Any, dtype: torch.dtype | None, carried: torch.dtype | None) -> Block:
    attention, activation = block.attn, block.mlp.gelu
    of_model = block.mlp.c_fc.weight.dtype
    dtype, carried = dtype or of_model, carried or of_model
    qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
    qkv.weight, qkv.bias = attention.in_proj_weight, attention.in_proj_bias
    norm1, norm2, expand, contract = block.ln_1, block.ln_2, block.mlp.c_fc, block.mlp.c_proj
    if carried != torch.float32:
        # Without scale and shift the norm takes and gives this dtype in one pass, and computes in float32 all the same.
        qkv, norm1 = _fold(norm1, qkv)
        expand, norm2 = _fold(norm2, expand)
    is_quick = type(activation) is QuickGELU
    if is_quick:
        expand, contract = _times(expand, _QUICK, _QUICK), _times(contract, 1 / _QUICK)
    is_exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    name = "gelu" if is_exact else "silu" if is_quick else None
    packed: Callable[[torch.Tensor], torch.Tensor] = PackedLinear([expand], name, dtype)
    return Block(
        attention.num_heads,
        Norm(norm1, dtype),
        PackedLinear([qkv], dtype=dtype),
        PackedLinear([_scale(attention.out_proj, block.ls_1)], dtype=dtype),
        Norm(norm2, dtype),
        packed if name else lambda states: activation(packed(states)),
        PackedLinear([_scale(contract, block.ls_2)], dtype=dtype),
        attend,
    )


def _fold(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[nn.Linear, nn.LayerNorm]:
    """The norm without its scale and shift, and the layer behind it with them."""
    weight = layer.weight.float()
    scaled = weight * norm.weight.float()
    return _linear(scaled, layer.bias.float() + weight @ norm.bias.float()), nn.LayerNorm(
        norm.normalized_shape, norm.eps, elementwise_affine=False
    )


def _scale(layer: nn.Linear, scale: nn.Module) -> nn.Linear:
    """The layer with the scale of its outputs."""
    if not isinstance(scale, LayerScale):
        return layer
    factors = scale.gamma.float()
    return _linear(layer.weight.float() * factors[:, None], layer.bias.float() * factors)


def _times(layer: nn.Linear, factor: float, bias_factor: float = 1.0) -> nn.Linear:
    return _linear(layer.weight.float() * factor, layer.bias.float() * bias_factor)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer
