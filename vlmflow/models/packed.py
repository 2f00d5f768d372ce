"""The layers of an image tower with packed weights: equal results, less time.

On processors the weights lie as the processor reads them: ``benchmarks/clip_cpu.py`` has the figures. On CUDA what is
carried from layer to layer is in the dtype of the products, and what costs time beside them is memory traffic: sums and
norms are one pass, and QuickGELU is one instead of three. Of the last layer only the token is computed that the vector
is made of, where it is made of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.blocks import Block, Blocks
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm

# QuickGELU(x) = x sigmoid(c x) = SiLU(c x) / c, which is one pass; the factors go into the weights before and behind.
_QUICK = 1.702


class PackedTower(nn.Module):
    """All layers, as one."""

    def __init__(self, blocks: Sequence[Block], *, of_token_alone: bool) -> None:
        """``of_token_alone``: of what the last layer gives, the first token alone is wanted."""
        super().__init__()
        *packed, last = blocks
        self._blocks, self._last = Blocks(packed, last.norm1), last
        self._of_token_alone = of_token_alone

    def forward(self, states: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        """(N, T, D) -> the same, or (N, 1, D) of the first token; an image tower has no mask."""
        assert attn_mask is None
        last, num_kept = self._last, 1 if self._of_token_alone else None
        states, normed = self._blocks(states.contiguous(), num_kept=num_kept)  # else no kernel of ours takes them
        queries, keys, values = split_heads(last.project(normed), last.num_heads)
        states, added = last.finish(states, last.attention(queries[:, :, :num_kept], keys, values))
        return states + added


def pack_block(
    num_heads: int,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    layers: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    activation: str | Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    carried: torch.dtype,
) -> Block:
    """A layer with packed weights.

    Args:
        norms: before attention, and before what follows it.
        layers: to queries, keys and values side by side; out of attention; the one that expands, and that contracts.
        activation: between the last two: ``gelu``, the exact one, ``quick_gelu``, or any other as it is.
        dtype: of the products.
        carried: of what is added up from layer to layer.
    """
    (norm1, norm2), (qkv, merge, expand, contract) = norms, layers
    if carried != torch.float32:
        # Without scale and shift the norm takes and gives this dtype in one pass, and computes in float32 all the same.
        qkv, norm1 = _fold(norm1, qkv)
        expand, norm2 = _fold(norm2, expand)
    name = {"gelu": "gelu", "quick_gelu": "silu"}.get(activation) if isinstance(activation, str) else None
    if name == "silu":
        expand, contract = _times(expand, _QUICK, _QUICK), _times(contract, 1 / _QUICK)
    packed: Callable[[torch.Tensor], torch.Tensor] = PackedLinear([expand], name, dtype)
    if not isinstance(activation, str):
        packed = _then(packed, activation)
    return Block(
        num_heads,
        Norm(norm1, dtype),
        PackedLinear([qkv], dtype=dtype),
        PackedLinear([merge], dtype=dtype),
        Norm(norm2, dtype),
        packed,
        PackedLinear([contract], dtype=dtype),
        attend,
    )


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A layer of (E, D) weights and (E,) biases, which are not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer


def _then(
    first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: second(first(states))


def _fold(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[nn.Linear, nn.LayerNorm]:
    """The norm without its scale and shift, and the layer behind it with them."""
    weight = layer.weight.float()
    scaled = weight * norm.weight.float()
    return linear(scaled, layer.bias.float() + weight @ norm.bias.float()), nn.LayerNorm(
        norm.normalized_shape, norm.eps, elementwise_affine=False
    )


def _times(layer: nn.Linear, factor: float, bias_factor: float = 1.0) -> nn.Linear:
    return linear(layer.weight.float() * factor, layer.bias.float() * bias_factor)
