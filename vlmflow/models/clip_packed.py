"""open_clip's image towers of CLIP with packed layers; on CUDA patches are made of pixels as they are."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import nn

from vlmflow.models.blocks import Block
from vlmflow.models.norm import Norm
from vlmflow.models.packed import PackedTower, linear, pack_block
from vlmflow.models.patches import PixelPatches
from vlmflow.models.pixels import PixelNormalizer


def can_pack(model: Any) -> bool:
    """Whether the layers of the image tower are all of open_clip's ordinary kind; those of SigLIP's towers are not."""
    transformer = getattr(model.visual, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    if not blocks or not getattr(transformer, "batch_first", False):
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
    blocks = [_packed(block, dtype, carried) for block in visual.transformer.resblocks]
    visual.transformer.resblocks = nn.ModuleList([PackedTower(blocks, of_token_alone=of_token_alone)])
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
    is_exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    return pack_block(
        attention.num_heads,
        (block.ln_1, block.ln_2),
        (
            linear(attention.in_proj_weight, attention.in_proj_bias),
            _scale(attention.out_proj, block.ls_1),
            block.mlp.c_fc,
            _scale(block.mlp.c_proj, block.ls_2),
        ),
        "quick_gelu" if type(activation) is QuickGELU else "gelu" if is_exact else activation,
        dtype or of_model,
        carried or of_model,
    )


def _scale(layer: nn.Linear, scale: nn.Module) -> nn.Linear:
    """The layer with the scale of its outputs."""
    if not isinstance(scale, LayerScale):
        return layer
    factors = scale.gamma.float()
    return linear(layer.weight.float() * factors[:, None], layer.bias.float() * factors)
