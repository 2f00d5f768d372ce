"""Keys and values of the tokens so far, in memory that is allocated once per batch."""

from __future__ import annotations

import torch

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.fused import attempt, can_fuse

# The kernel holds the keys of a head in registers.
_MAX_FUSED_TOKENS = 128


class SlicedCache:
    """Shows no more than it holds; for decoding step by step."""

    def __init__(self, num_layers: int, max_tokens: int) -> None:
        self.position: int = 0
        self._max_tokens = max_tokens
        self._kept: list[torch.Tensor | None] = [None] * num_layers

    def attend(self, layer: int, projected: torch.Tensor, num_heads: int) -> torch.Tensor:
        """As :meth:`vlmflow.models.blip_fast.text.SelfCache.attend`."""
        queries, keys, values = split_heads(projected, num_heads)
        kept = self._kept[layer]
        if kept is None:
            kept = self._kept[layer] = keys.new_empty((2, *keys.shape[:2], self._max_tokens, keys.shape[-1]))
        kept[0, :, :, self.position] = keys[:, :, 0]
        kept[1, :, :, self.position] = values[:, :, 0]
        keys, values = kept[:, :, :, : self.position + 1].unbind(0)
        return attend(queries, keys, values)

    def take(self, rows: torch.Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was; there are as many rows after as ``rows`` names."""
        for layer, kept in enumerate(self._kept):
            if kept is None:
                continue
            seen = kept[:, :, :, : self.position + 1].index_select(1, rows)
            if len(rows) != kept.shape[1]:
                self._kept[layer] = kept = kept.new_empty((2, len(rows), *kept.shape[2:]))
            kept[:, :, :, : self.position + 1] = seen


class IndexedCache:
    """Always shows its full length, masked after the position, which lies on the device: no shape ever changes."""

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        """``shape``: (N, H, L, d); ``like``: gives device and dtype."""
        self._kept = [like.new_zeros((2, *shape)) for _ in range(num_layers)]
        self._positions = torch.arange(shape[2], device=like.device)
        self.position: torch.Tensor = torch.zeros(1, dtype=torch.int64, device=like.device)

    def attend(self, layer: int, projected: torch.Tensor, num_heads: int) -> torch.Tensor:
        """As :meth:`vlmflow.models.blip_fast.text.SelfCache.attend`."""
        kept = self._kept[layer]
        if len(self._positions) <= _MAX_FUSED_TOKENS and can_fuse(projected, kept):
            from vlmflow.models.triton_attention import attend_step

            context = attempt(attend_step, projected, kept[0], kept[1], self.position)
            if context is not None:
                return context
        queries, keys, values = split_heads(projected, num_heads)
        kept[0].index_copy_(2, self.position, keys)
        kept[1].index_copy_(2, self.position, values)
        return attend(queries, kept[0], kept[1], (self._positions <= self.position).view(1, 1, 1, -1))
