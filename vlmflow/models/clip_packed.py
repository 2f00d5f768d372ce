"""The layers of a CLIP image tower with packed weights, for processors: equal results, less time.

``benchmarks/clip_cpu.py`` has the figures. On GPUs open_clip's own attention is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.linear import PackedLinear


def pack_image_tower(model: Any, dtype: torch.dtype | None = None) -> bool:
    """Puts packed layers in the place of those of the image tower, where all are of open_clip's ordinary kind.

    Other kinds, such as those of SigLIP's towers, stay as they are.

    Args:
        dtype: of the products; what is added up from layer to layer keeps the model's. None: the model's.

    Returns:
        Whether the tower is packed.
    """
    transformer = getattr(model.visual, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None or not getattr(transformer, "batch_first", False):
        return False
    if not all(type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv") for block in blocks):
        return False
    for number, block in enumerate(blocks):
        blocks[number] = _PackedBlock(block, dtype)
    return True


class _PackedBlock(nn.Module):
    """Normalise, attend, add; normalise, expand, contract, add."""

    def __init__(self, block: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        attention = block.attn
        self._num_heads = attention.num_heads
        self._norm1, self._norm2 = block.ln_1, block.ln_2
        self._scale1, self._scale2 = block.ls_1, block.ls_2
        qkv = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        qkv.weight, qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self._qkv, self._projection = PackedLinear([qkv], dtype=dtype), PackedLinear([attention.out_proj], dtype=dtype)
        is_exact = isinstance(block.mlp.gelu, nn.GELU) and block.mlp.gelu.approximate == "none"
        self._expand = PackedLinear([block.mlp.c_fc], "gelu" if is_exact else None, dtype)
        self._activation = nn.Identity() if is_exact else block.mlp.gelu
        self._contract = PackedLinear([block.mlp.c_proj], dtype=dtype)

    def forward(self, states: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, D) -> the same; an image tower has no mask."""
        assert attn_mask is None
        queries, keys, values = split_heads(self._qkv(self._norm1(states)), self._num_heads)
        states = states + self._scale1(self._projection(attend(queries, keys, values)))
        added: torch.Tensor = self._scale2(self._contract(self._activation(self._expand(self._norm2(states)))))
        return states + added
