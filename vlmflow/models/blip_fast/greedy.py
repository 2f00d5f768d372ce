"""Greedy decoding of a batch: the same tokens as ``generate(do_sample=False)``."""

from __future__ import annotations

import torch

from vlmflow.models.attention import growing
from vlmflow.models.blip_fast.cache import SlicedCache
from vlmflow.models.blip_fast.graph import DecodeGraphs
from vlmflow.models.blip_fast.special import SpecialTokens
from vlmflow.models.blip_fast.text import TextTower

# Rows that have ended are dropped once they are this share, which costs a copy of the others' features and caches:
# dropped earlier, those are copied too often, and later, too much is decoded for nothing.
_ENDED_SHARE = 0.5


class GreedyDecoder:
    """The most probable token at every step, for all images of a batch at once."""

    def __init__(self, tower: TextTower, special: SpecialTokens) -> None:
        self._tower = tower
        self._special = special
        self._graphs = DecodeGraphs(tower, special)

    def __call__(self, images: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """Decodes until every caption has ended.

        Args:
            images: (N, T, D) features of the vision tower, N at least 1.
            max_tokens: per caption, the end counted. A caption also ends where the model has no more positions.

        Returns:
            (N, at most ``max_tokens``) int64, padded after the end of each caption.
        """
        max_tokens = min(max_tokens, self._tower.max_tokens)
        decoded = self._graphs.decode(images, max_tokens) if images.is_cuda else None
        if decoded is not None:
            return decoded
        with growing(images.device):
            return self._decode(images, max_tokens)

    def _decode(self, images: torch.Tensor, max_tokens: int) -> torch.Tensor:
        tower, special, device = self._tower, self._special, images.device
        cache = SlicedCache(len(tower.layers), max_tokens)
        decoded = torch.full((len(images), max_tokens), special.pad, device=device)
        rows = torch.arange(len(images), device=device)  # those still decoded, among all
        running = torch.ones(len(images), dtype=torch.bool, device=device)
        tokens = torch.full((len(images),), special.begin, device=device)
        for step in range(max_tokens):
            cache.position = step
            best = tower.step(tokens.unsqueeze(1), cache, images)[:, 0].float().argmax(dim=-1)
            tokens = torch.where(running, best, special.pad)
            decoded[rows, step] = tokens
            running &= tokens != special.end
            num_running = int(running.sum())
            if num_running == 0:
                return decoded[:, : step + 1]
            if num_running <= (1 - _ENDED_SHARE) * len(rows):
                going = running.nonzero()[:, 0]
                images = images.index_select(0, going)
                cache.take(going)
                rows, tokens, running = rows[going], tokens[going], running[going]
        return decoded
