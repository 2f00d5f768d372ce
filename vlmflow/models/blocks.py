"""The layer that vision transformers are made of: norms stand before what they feed, never behind a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.linear import PackedLinear

# Of the rows that pass all layers together on a processor: what lies between two layers should stay in the cache.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Block:
    """Normalise, attend, add; normalise, expand, contract, add. N rows of T tokens, D dimensions, H heads of d."""

    num_heads: int
    norm1: Callable[[torch.Tensor], torch.Tensor]
    project: PackedLinear  # to queries, keys and values
    merge: PackedLinear
    norm2: Callable[[torch.Tensor], torch.Tensor]
    expand: PackedLinear
    contract: PackedLinear
    attention: Callable[..., torch.Tensor] = attend

    def __call__(self, states: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, D) -> the same; ``visible``: bool, (N, 1, 1, T), False on padding; None: there is none."""
        queries, keys, values = split_heads(self.project(self.norm1(states)), self.num_heads)
        return self.finish(states, self.attention(queries, keys, values, visible))

    def finish(self, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What follows attention: (N, T, D) both -> the same."""
        states = states + self.merge(context)
        return states + self.contract(self.expand(self.norm2(states)))
