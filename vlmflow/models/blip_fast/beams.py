"""Beam search: the captions of ``generate(num_beams=B)`` with its defaults, no sampling and a length penalty of 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmflow.models.blip_fast.cache import SlicedCache
from vlmflow.models.blip_fast.special import SpecialTokens
from vlmflow.models.blip_fast.text import TextTower

# Added to the score of what must not be chosen. Finite, as in transformers: sums and ties come out as they do there.
_NEVER = -1e9


@dataclass
class _Beams:
    """The best sequences of every image, best first: (N, B, max_tokens) tokens and (N, B) scores."""

    tokens: torch.Tensor
    scores: torch.Tensor

    def pick(self, places: torch.Tensor) -> _Beams:
        """Those at (N, K) places, in that order."""
        places_of_tokens = places.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])
        return _Beams(self.tokens.gather(1, places_of_tokens), self.scores.gather(1, places))


def decode_beams(
    tower: TextTower, special: SpecialTokens, images: torch.Tensor, max_tokens: int, num_beams: int
) -> torch.Tensor:
    """Decodes all images of a batch, ``num_beams`` captions each, and keeps the best.

    Args:
        images: (N, T, D) features of the vision tower, N at least 1.
        max_tokens: per caption, the end counted. A caption also ends where the model has no more positions.
        num_beams: at least 1.

    Returns:
        (N, at most ``max_tokens``) int64, padded after the end of each caption.
    """
    max_tokens = min(max_tokens, tower.max_tokens)
    cache = SlicedCache(len(tower.layers), max_tokens)
    shape, device = (len(images), num_beams), images.device
    none_yet = torch.full((*shape, max_tokens), special.pad, device=device)
    running = _Beams(none_yet, torch.zeros(shape, device=device))
    running.scores[:, 1:] = _NEVER  # all beams begin alike: one is enough
    ended = _Beams(none_yet.clone(), torch.full(shape, _NEVER, device=device))
    has_ended = torch.zeros(shape, dtype=torch.bool, device=device)
    can_improve = torch.ones((len(images), 1), dtype=torch.bool, device=device)
    last = torch.full(shape, special.begin, device=device)
    first_row = torch.arange(len(images), device=device).unsqueeze(1) * num_beams
    for step in range(max_tokens):
        cache.position = step
        log_probabilities = tower.step(last, cache, images).float().log_softmax(dim=-1)
        candidates, parents = _extend(running, log_probabilities, step)
        stops = (candidates.tokens[:, :, step] == special.end) | (step + 1 == max_tokens)

        going = _Beams(candidates.tokens, candidates.scores + stops * _NEVER)
        chosen = going.scores.topk(num_beams).indices
        running = going.pick(chosen)

        # Only a caption among the best may end; its score is that of its mean token.
        ends = stops & (torch.arange(stops.shape[1], device=device) < num_beams)
        scores = candidates.scores / (step + 1) + ~can_improve * _NEVER + ~ends * _NEVER
        merged = _Beams(torch.cat([ended.tokens, candidates.tokens], 1), torch.cat([ended.scores, scores], 1))
        best = merged.scores.topk(num_beams).indices
        ended, has_ended = merged.pick(best), torch.cat([has_ended, ends], 1).gather(1, best)

        worst_ended = torch.where(has_ended, ended.scores.amin(dim=1, keepdim=True), _NEVER)
        can_improve &= (running.scores[:, :1] / (step + 1) > worst_ended).any(dim=1, keepdim=True)
        if stops.all() or not can_improve.any():
            break
        last = running.tokens[:, :, step]
        cache.take((parents.gather(1, chosen) + first_row).flatten())
    return ended.tokens[:, 0, : step + 1]


def _extend(beams: _Beams, log_probabilities: torch.Tensor, step: int) -> tuple[_Beams, torch.Tensor]:
    """The best continuations by one token.

    Twice as many as there are beams: each beam can end in one way only, so that as many as before can go on.

    Args:
        log_probabilities: (N, B, V).

    Returns:
        2 B candidates per image, best first; and (N, 2 B), which beam each continues.
    """
    num_beams, num_words = log_probabilities.shape[1:]
    totals = (log_probabilities + beams.scores.unsqueeze(-1)).flatten(1)
    scores, places = totals.topk(2 * num_beams)
    parents = places // num_words
    candidates = _Beams(beams.pick(parents).tokens, scores)
    candidates.tokens[:, :, step] = places % num_words
    return candidates, parents
