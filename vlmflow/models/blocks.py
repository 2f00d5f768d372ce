"""The layer that vision transformers are made of: norms stand before what they feed, never behind a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm

# Of the rows that pass all layers together on a processor: what lies between two layers should stay in the cache.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Block:
    """Normalise, attend, add; normalise, expand, contract, add. N rows of T tokens, D dimensions, H heads of d.

    The first norm and the last sum are done by who calls it, since a sum and the norm behind it are one pass.
    """

    num_heads: int
    norm1: Norm
    project: PackedLinear  # to queries, keys and values
    merge: PackedLinear
    norm2: Norm
    expand: Callable[[torch.Tensor], torch.Tensor]
    contract: PackedLinear
    attention: Callable[..., torch.Tensor] = attend

    def __call__(
        self, states: torch.Tensor, normed: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, T, D), and ``norm1`` of it -> two of the same shape, whose sum is what the layer gives.

        ``visible``: bool, (N, 1, 1, T), False on padding; None: there is none.
        """
        queries, keys, values = split_heads(self.project(normed), self.num_heads)
        return self.finish(states, self.attention(queries, keys, values, visible))

    def finish(self, states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows attention: (N, T, D) both -> as :meth:`__call__`."""
        states, normed = self.norm2.add(states, self.merge(context))
        return states, self.contract(self.expand(normed))


def run_blocks(
    blocks: Sequence[Block], states: torch.Tensor, last: Norm, visible: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T, D) -> what the last of the blocks gives, and the norm ``last`` of it."""
    first, *behind = [*(block.norm1 for block in blocks), last]
    normed = first(states)
    for block, following in zip(blocks, behind, strict=True):
        states, added = block(states, normed, visible)
        states, normed = following.add(states, added)
    return states, normed
