"""ViLBERT (Lu et al. 2019, arXiv:1908.02265; multi-task: Lu et al. 2020, arXiv:1912.02315).

Words and image regions go through transformers of their own, which attend to each other in some of their layers.
N: pairs of image and text, T: tokens, R: regions, the whole image in the first place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from vlmflow.models.vilbert.config import VilbertConfig
from vlmflow.models.vilbert.heads import HEAD_CLASSES
from vlmflow.models.vilbert.layers import NORM_EPS, Connection, Layer, Stream

# The decoder of masked words is the word embeddings' weight: the published files hold it twice, safetensors once.
TIED = "cls.predictions.decoder.weight"
BOX_NUMBERS = 5  # left, top, right, bottom, area: as parts of the image


@dataclass(frozen=True)
class Text:
    """``ids``: (N, T) int64; ``mask``: (N, T) bool; ``task``: (N,) int64, where the model has task tokens."""

    ids: torch.Tensor
    mask: torch.Tensor
    task: torch.Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """Both streams at the end, and the pooled pair.

    ``words``: (N, T, D), ``regions``: (N, R, V), ``pair``: (N, B).
    """

    words: torch.Tensor
    regions: torch.Tensor
    pair: torch.Tensor


class WordEmbeddings(nn.Module):
    """Words, their places, and the task as a token behind the first."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        if config.num_task_tokens:
            self.task_embeddings = nn.Embedding(config.num_task_tokens, config.hidden_size)
        self._has_task = config.num_task_tokens > 0

    def forward(self, text: Text) -> Stream:
        """T grows by one where the model has task tokens; the others keep their places."""
        places = self.position_embeddings.weight[: text.ids.shape[1]]
        # There is one segment: the first type for all.
        states = self.word_embeddings(text.ids) + places + self.token_type_embeddings.weight[0]
        mask = text.mask
        if self._has_task:
            assert text.task is not None
            task = self.task_embeddings(text.task)[:, None]
            states = torch.cat([states[:, :1], task, states[:, 1:]], dim=1)
            mask = functional.pad(mask, (1, 0), value=True)
        return Stream(self.LayerNorm(states), mask)


class RegionEmbeddings(nn.Module):
    """What a region shows and where it is."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.image_embeddings = nn.Linear(config.v_feature_size, config.v_hidden_size)
        self.image_location_embeddings = nn.Linear(BOX_NUMBERS, config.v_hidden_size)
        self.LayerNorm = nn.LayerNorm(config.v_hidden_size, eps=NORM_EPS)

    def forward(self, features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(N, R, F), (N, R, 5) -> (N, R, V)."""
        embedded: torch.Tensor = self.LayerNorm(
            self.image_embeddings(features) + self.image_location_embeddings(places)
        )
        return embedded


class Encoder(nn.Module):
    """The layers of both streams, and what connects them."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.v_layer = nn.ModuleList(
            Layer(config.v_hidden_size, config.v_num_attention_heads, config.v_intermediate_size)
            for _ in range(config.v_num_hidden_layers)
        )
        self.c_layer = nn.ModuleList(Connection(config) for _ in config.v_biattention_id)
        self._v_ends, self._t_ends = config.v_biattention_id, config.t_biattention_id

    def alone(self, regions: Stream) -> Stream:
        """The regions up to the first connection, where no text has been seen yet."""
        first = self._v_ends[0] if self._v_ends else len(self.v_layer)
        for layer in self.v_layer[:first]:
            regions = layer(regions)
        return regions

    def forward(self, regions: Stream, words: Stream) -> tuple[Stream, Stream]:
        """From what :meth:`alone` gave to the end: connection i stands before the layers that the two lists name."""
        v_start, t_start = self._v_ends[0] if self._v_ends else len(self.v_layer), 0
        for connection, v_end, t_end in zip(self.c_layer, self._v_ends, self._t_ends, strict=True):
            regions, words = self._run(regions, words, slice(v_start, v_end), slice(t_start, t_end))
            regions, words = connection(regions, words)
            v_start, t_start = v_end, t_end
        return self._run(regions, words, slice(v_start, None), slice(t_start, None))

    def _run(self, regions: Stream, words: Stream, v_layers: slice, t_layers: slice) -> tuple[Stream, Stream]:
        for layer in self.v_layer[v_layers]:
            regions = layer(regions)
        for layer in self.layer[t_layers]:
            words = layer(words)
        return regions, words


class Pooler(nn.Module):
    """A stream's first token in the space that both share."""

    def __init__(self, width: int, shared: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shared)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(N, T, D) -> (N, B)."""
        return functional.relu(self.dense(states[:, 0]))


class TwoStreams(nn.Module):
    """Embeddings, encoder and poolers."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.embeddings = WordEmbeddings(config)
        self.v_embeddings = RegionEmbeddings(config)
        self.encoder = Encoder(config)
        self.t_pooler = Pooler(config.hidden_size, config.bi_hidden_size)
        self.v_pooler = Pooler(config.v_hidden_size, config.bi_hidden_size)


class Vilbert(nn.Module):
    """The model with the heads that its checkpoint holds; module names are those of the published tensors."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = TwoStreams(config)
        for name in config.heads:
            self.add_module(name, HEAD_CLASSES[name](config))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the decoder of masked words share the word embeddings' weight."""
        if "cls" in self.config.heads:
            decoder = self.get_submodule("cls.predictions.decoder")
            decoder.weight = self.bert.embeddings.word_embeddings.weight

    def embed_regions(self, features: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> Stream:
        """What depends on the image alone, to be used for many texts.

        Args:
            features: (N, R, F) of the detector.
            places: (N, R, 5) left, top, right, bottom and area, as parts of the image.
            mask: (N, R) bool, False for padding.
        """
        stream = Stream(self.bert.v_embeddings(features, places), mask)
        alone: Stream = self.bert.encoder.alone(stream)
        return alone

    def encode(self, regions: Stream, text: Text) -> Encoded:
        """Text i with image i."""
        regions, words = self.bert.encoder(regions, self.bert.embeddings(text))
        seen, read = self.bert.v_pooler(regions.states), self.bert.t_pooler(words.states)
        pair = read * seen if self.config.fusion_method == "mul" else read + seen
        return Encoded(words.states, regions.states, pair)
