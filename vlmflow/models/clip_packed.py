"""The layers of a CLIP image tower with packed weights: equal results, less time.

On processors the weights lie as the processor reads them: ``benchmarks/clip_cpu.py`` has the figures. On CUDA in
bfloat16 what is carried from layer to layer is bfloat16, and what costs time beside the products is memory traffic: a
norm of open_clip's makes a float32 copy of its input and one of its output, and QuickGELU is three passes over the
widest of all tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import nn

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.linear import PackedLinear

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
    blocks = model.visual.transformer.resblocks
    for number, block in enumerate(blocks):
        blocks[number] = _PackedBlock(block, dtype, carried)
    return True


class _PackedBlock(nn.Module):
    """Normalise, attend, add; normalise, expand, contract, add."""

    def __init__(self, block: Any, dtype: torch.dtype | None, carried: torch.dtype | None) -> None:
        super().__init__()
        attention, activation = block.attn, block.mlp.gelu
        of_model = block.mlp.c_fc.weight.dtype
        dtype, carried = dtype or of_model, carried or of_model
        self._num_heads = attention.num_heads
        self._norm1, self._norm2 = block.ln_1, block.ln_2
        qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        qkv.weight, qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        expand = block.mlp.c_fc
        if carried != torch.float32:
            # Without scale and shift the norm takes and gives this dtype in one pass, and computes in float32 all the
            # same.
            qkv, self._norm1 = _fold(block.ln_1, qkv)
            expand, self._norm2 = _fold(block.ln_2, expand)
        contract = block.mlp.c_proj
        is_quick = type(activation) is QuickGELU
        if is_quick:
            expand, contract = _times(expand, _QUICK, _QUICK), _times(contract, 1 / _QUICK)
        is_exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
        self._qkv = PackedLinear([qkv], dtype=dtype)
        self._projection = PackedLinear([_scale(attention.out_proj, block.ls_1)], dtype=dtype)
        self._expand = PackedLinear([expand], "gelu" if is_exact else "silu" if is_quick else None, dtype)
        self._activation = nn.Identity() if is_exact or is_quick else activation
        self._contract = PackedLinear([_scale(contract, block.ls_2)], dtype=dtype)

    def forward(self, states: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, D) -> the same; an image tower has no mask."""
        assert attn_mask is None
        queries, keys, values = split_heads(self._qkv(self._norm1(states)), self._num_heads)
        states = states + self._projection(attend(queries, keys, values))
        added: torch.Tensor = self._contract(self._activation(self._expand(self._norm2(states))))
        return states + added


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
