"""Keys and values of the tokens so far, in memory that is allocated once per batch."""

from __future__ import annotations

import torch


class SlicedCache:
    """Shows no more than it holds; for decoding step by step."""

    mask: torch.Tensor | None = None

    def __init__(self, num_layers: int, max_tokens: int) -> None:
        self.position: int = 0
        self._max_tokens = max_tokens
        self._kept: list[torch.Tensor | None] = [None] * num_layers

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps (N, H, 1, d) of the token at ``position``; returns (N, H, position + 1, d)."""
        kept = self._kept[layer]
        if kept is None:
            kept = self._kept[layer] = keys.new_empty((2, *keys.shape[:2], self._max_tokens, keys.shape[-1]))
        kept[0, :, :, self.position] = keys[:, :, 0]
        kept[1, :, :, self.position] = values[:, :, 0]
        return kept[0, :, :, : self.position + 1], kept[1, :, :, : self.position + 1]

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

    @property
    def mask(self) -> torch.Tensor:
        """(1, 1, 1, L) bool: the tokens up to the position."""
        return (self._positions <= self.position).view(1, 1, 1, -1)

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps (N, H, 1, d) of the token at ``position``; returns (N, H, L, d), of which the mask hides a part."""
        kept = self._kept[layer]
        kept[0].index_copy_(2, self.position, keys)
        kept[1].index_copy_(2, self.position, values)
        return kept[0], kept[1]
