"""The layer that vision transformers are made of: norms stand before what they feed, never behind a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.fused import can_fuse
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
        return self.finish(states, self.context(normed, visible))

    def context(self, normed: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """What the tokens see: ``norm1`` of (N, T, D) -> the same."""
        queries, keys, values = split_heads(self.project(normed), self.num_heads)
        return self.attention(queries, keys, values, visible)

    def finish(self, states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows attention: (N, T, D) both -> as :meth:`__call__`."""
        states, normed = self.norm2.add(states, self.merge(context))
        return states, self.contract(self.expand(normed))


class Blocks:
    """Some blocks in a row, and the norm behind the last of them."""

    def __init__(self, blocks: Sequence[Block], last: Norm) -> None:
        self._blocks = blocks
        self._norms = [*(block.norm1 for block in blocks), last]
        # Of each block the biases, (D,) float32, of all that is added up to its middle, and up to its end.
        self._offsets: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block in blocks:
            middle = block.merge.bias.float() + (self._offsets[-1][1] if self._offsets else 0.0)
            self._offsets.append((middle, middle + block.contract.bias.float()))

    def __call__(
        self, states: torch.Tensor, visible: torch.Tensor | None = None, num_kept: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs all.

        Args:
            states: (N, T, D), which may be written to.
            visible: bool, (N, 1, 1, T), False on padding; None: there is none.
            num_kept: tokens of which the states are wanted, K, from the first on; None: of all.

        Returns:
            (N, K, D) of what the last block gives, and (N, T, D) of its norm.
        """
        first, *behind = self._norms
        normed = first(states)
        if self._blocks and can_fuse(states) and states.dtype == self._blocks[0].merge.bias.dtype:
            return self._in_place(states, normed, visible, num_kept)
        for block, following in zip(self._blocks, behind, strict=True):
            states, added = block(states, normed, visible)
            states, normed = following.add(states, added)
        return states[:, :num_kept], normed

    def _in_place(
        self, states: torch.Tensor, normed: torch.Tensor, visible: torch.Tensor | None, num_kept: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As all, on a GPU: products add to the states, and norms what the biases are, which spares a pass each."""
        for block, following, offsets in zip(self._blocks, self._norms[1:], self._offsets, strict=True):
            middle, offset = offsets
            block.merge.onto(states, block.context(normed, visible))
            normed = block.norm2(states, middle)
            block.contract.onto(states, block.expand(normed))
            normed = following(states, offset)
        return (states[:, :num_kept] + offset).to(states.dtype), normed
