"""Transformer layers of the two streams, and those in which they attend to each other.

Attributes bear the names that the published checkpoints give their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from vlmflow.models.vilbert.config import VilbertConfig

NORM_EPS = 1e-12  # as BERT has it


@dataclass(frozen=True)
class Stream:
    """A stream between two layers. N: pairs, T: its tokens, D: its width.

    Attributes:
        states: (N, T, D).
        mask: (N, T) bool, False for padding.
    """

    states: torch.Tensor
    mask: torch.Tensor

    def attended(self) -> torch.Tensor:
        """The mask as attention wants it: (N, 1, 1, T)."""
        return self.mask[:, None, None, :]

    def with_states(self, states: torch.Tensor) -> Stream:
        """The same tokens further on."""
        return Stream(states, self.mask)

    def take(self, rows: Sequence[int] | torch.Tensor) -> Stream:
        """Those of the given rows, in their order; a row may come more than once."""
        at = torch.as_tensor(rows, dtype=torch.long, device=self.mask.device)
        return Stream(self.states[at], self.mask[at])


class AddAndNorm(nn.Module):
    """A projection, the residual added, normalised."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, inner: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """(N, T, inner), (N, T, width) -> (N, T, width)."""
        normed: torch.Tensor = self.LayerNorm(self.dense(inner) + residual)
        return normed


class Expansion(nn.Module):
    """The first half of a feed-forward part."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(N, T, width) -> (N, T, inner)."""
        return functional.gelu(self.dense(states))


class QueryKeyValue(nn.Module):
    """Multi-head attention of a stream to itself."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self._num_heads = num_heads

    def forward(self, stream: Stream) -> torch.Tensor:
        """(N, T, D)."""
        states = stream.states
        query, key, value = self.query(states), self.key(states), self.value(states)
        return attend(query, key, value, stream.attended(), self._num_heads)


class SelfAttention(nn.Module):
    """Attention with its residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self = QueryKeyValue(width, num_heads)
        self.output = AddAndNorm(width, width)

    def forward(self, stream: Stream) -> torch.Tensor:
        """(N, T, D)."""
        attended: torch.Tensor = self.output(self.self(stream), stream.states)
        return attended


class Layer(nn.Module):
    """One layer of one stream."""

    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.intermediate = Expansion(width, inner)
        self.output = AddAndNorm(inner, width)

    def forward(self, stream: Stream) -> Stream:
        """The stream one layer further."""
        attended = self.attention(stream)
        return stream.with_states(self.output(self.intermediate(attended), attended))


class CoAttention(nn.Module):
    """Each stream's queries on the other's keys and values. 1: regions, 2: words."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        width = config.bi_hidden_size
        self.query1, self.key1, self.value1 = (nn.Linear(config.v_hidden_size, width) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(config.hidden_size, width) for _ in range(3))
        self._num_heads = config.bi_num_attention_heads

    def forward(self, regions: Stream, words: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """What the regions take from the words, (N, R, B), and the words from the regions, (N, T, B)."""
        query, key, value = self.query1(regions.states), self.key2(words.states), self.value2(words.states)
        to_regions = attend(query, key, value, words.attended(), self._num_heads)
        query, key, value = self.query2(words.states), self.key1(regions.states), self.value1(regions.states)
        return to_regions, attend(query, key, value, regions.attended(), self._num_heads)


class CoOutput(nn.Module):
    """The residuals of co-attention."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        width, regions, words = config.bi_hidden_size, config.v_hidden_size, config.hidden_size
        self.dense1, self.dense2 = nn.Linear(width, regions), nn.Linear(width, words)
        self.LayerNorm1 = nn.LayerNorm(regions, eps=NORM_EPS)
        self.LayerNorm2 = nn.LayerNorm(words, eps=NORM_EPS)
        # Every published checkpoint holds these two, and nothing reads them.
        self.q_dense1, self.q_dense2 = nn.Linear(width, regions), nn.Linear(width, words)

    def forward(
        self, regions: Stream, words: Stream, taken: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams' states with what they took from each other."""
        to_regions, to_words = taken
        return (
            self.LayerNorm1(self.dense1(to_regions) + regions.states),
            self.LayerNorm2(self.dense2(to_words) + words.states),
        )


class Connection(nn.Module):
    """A co-attentional layer (section 2.2 of arXiv:1908.02265): co-attention, then each stream's feed-forward part."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.biattention = CoAttention(config)
        self.biOutput = CoOutput(config)
        self.v_intermediate = Expansion(config.v_hidden_size, config.v_intermediate_size)
        self.v_output = AddAndNorm(config.v_intermediate_size, config.v_hidden_size)
        self.t_intermediate = Expansion(config.hidden_size, config.intermediate_size)
        self.t_output = AddAndNorm(config.intermediate_size, config.hidden_size)

    def forward(self, regions: Stream, words: Stream) -> tuple[Stream, Stream]:
        """Both streams one layer further."""
        seen, read = self.biOutput(regions, words, self.biattention(regions, words))
        regions = regions.with_states(self.v_output(self.v_intermediate(seen), seen))
        return regions, words.with_states(self.t_output(self.t_intermediate(read), read))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """(N, Q, D), (N, K, D), (N, K, D), (N, 1, 1, K) bool -> (N, Q, D)."""
    query, key, value = (part.view(*part.shape[:2], num_heads, -1).transpose(1, 2) for part in (query, key, value))
    heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return heads.transpose(1, 2).flatten(2)
