"""BLIP's text tower: an encoder of texts, or one step of a decoder, with cross-attention to images or without."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from vlmflow.models.attention import attend_within
from vlmflow.models.blip_fast.cross import CrossAttention
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Carried, Norm

# Half-precision values in 16 bytes.
_ALIGNED = 8


class SelfCache(Protocol):
    """Keys and values of the tokens so far. N rows, H heads of d dimensions."""

    @property
    def position(self) -> int | torch.Tensor:
        """Of the token that is being decoded."""

    def attend(self, layer: int, projected: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Keeps the keys and values of the token, and has it attend to all so far.

        Args:
            projected: (N, 1, 3 H d): its queries, keys and values.

        Returns:
            (N, 1, H d).
        """


class TextTower:
    """The weights of a ``BlipTextModel``, and of its language modelling head where it has one.

    N texts of L tokens, V words, D dimensions, H heads of d; T tokens of E dimensions of an image.
    """

    def __init__(self, model: Any, head: Any | None = None, image_dtype: torch.dtype | None = None) -> None:
        """Takes over the weights.

        Args:
            model: a ``BlipTextModel``.
            head: a ``BlipTextOnlyMLMHead``; None: the model is an encoder.
            image_dtype: of what is done with the images' features; None: that of the weights.
        """
        config = model.config
        self.num_heads: int = config.num_attention_heads
        self.width: int = config.hidden_size
        self.max_tokens: int = config.max_position_embeddings
        self._words = model.embeddings.word_embeddings
        self._positions = model.embeddings.position_embeddings.weight
        self._dtype: torch.dtype = self._positions.dtype
        self._norm = Norm(model.embeddings.LayerNorm)
        self.layers = [_Layer(layer, config, image_dtype) for layer in model.encoder.layer]
        self._head = None if head is None else _Head(head.predictions, config.hidden_act)

    def encode(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs whole texts, each token of which sees all others.

        Args:
            ids: (N, L) int64.
            mask: (N, L) bool, False on padding; None: there is none.
            features: (N, T, E) of the images that the texts attend to, in the images' dtype; None: they attend to none.

        Returns:
            (N, L, D) float32.
        """
        carried = self._begin(self._words(ids) + self._positions[: ids.shape[1]])
        for layer in self.layers:
            context = attend_within(layer.project(carried.rounded), mask, self.num_heads)
            carried = layer.finish(layer.attended(carried, context), features)
        return carried.states

    def step(self, tokens: torch.Tensor, cache: SelfCache, features: torch.Tensor) -> torch.Tensor:
        """Runs one token of each text.

        Args:
            tokens: (N, B) int64: B beams of each of N images.
            cache: of N * B rows.
            features: (N, T, E) of the images, in their dtype; the beams of an image share them.

        Returns:
            (N, B, V) logits of the next token.
        """
        assert self._head is not None
        carried = self._begin(self._words(tokens) + self._positions[cache.position])
        num_images, num_beams = tokens.shape
        for index, layer in enumerate(self.layers):
            projected = layer.project(carried.rounded.flatten(0, 1).unsqueeze(1))
            context = cache.attend(index, projected, self.num_heads).view(num_images, num_beams, -1)
            carried = layer.finish(layer.attended(carried, context), features)
        return self._head(carried.rounded)

    def _begin(self, embedded: torch.Tensor) -> Carried:
        states = self._norm(embedded)
        return Carried(states, states.to(self._dtype))


class _Layer:
    """Attend to the text, attend to the image, expand and contract; each added to its input and normalised."""

    def __init__(self, layer: Any, config: Any, image_dtype: torch.dtype | None) -> None:
        attention = layer.attention
        self.project = PackedLinear([attention.self.query, attention.self.key, attention.self.value])
        self._out, self._out_norm = PackedLinear([attention.output.dense]), Norm(attention.output.LayerNorm)
        cross = getattr(layer, "crossattention", None)
        self._cross = None if cross is None else CrossAttention(cross, config.num_attention_heads, image_dtype)
        self._expand = PackedLinear([layer.intermediate.dense], config.hidden_act)
        self._contract, self._norm = PackedLinear([layer.output.dense]), Norm(layer.output.LayerNorm)
        self._dtype: torch.dtype = layer.output.dense.weight.dtype

    def attended(self, carried: Carried, context: torch.Tensor) -> Carried:
        """What follows self-attention, on (N, L, D) both."""
        return self._out_norm.carried(carried.states, self._out(context), self._dtype)

    def finish(self, carried: Carried, features: torch.Tensor | None) -> Carried:
        """Cross-attention and the two linear layers: (N, L, D) and (N, T, E) -> (N, L, D)."""
        if features is not None:
            assert self._cross is not None
            carried = self._cross(carried, features)
        expanded = self._expand(carried.rounded)
        return self._norm.carried(carried.states, self._contract(expanded), self._dtype)


class _Head:
    """The language modelling head: (..., D) -> (..., V) logits."""

    def __init__(self, predictions: Any, activation: str) -> None:
        self._transform = PackedLinear([predictions.transform.dense], activation)
        self._norm = Norm(predictions.transform.LayerNorm)
        words = predictions.decoder
        self._num_words: int = words.out_features
        self._words = PackedLinear([_aligned(words) if words.weight.is_cuda else words])

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self._words(self._norm(self._transform(states)))[..., : self._num_words]


def _aligned(words: nn.Linear) -> nn.Linear:
    """With outputs that nobody reads: rows of logits begin where the fast kernels for CUDA can write them.

    BLIP's vocabulary of 30,524 words takes a third of the time so: 26 us instead of 78 for 256 rows on an H200.
    """
    added = -words.out_features % _ALIGNED
    layer = nn.Linear(words.in_features, words.out_features + added, device="meta")
    for name, value in (("weight", words.weight), ("bias", words.bias)):
        padded = torch.cat([value.detach(), value.new_zeros((added, *value.shape[1:]))])
        setattr(layer, name, nn.Parameter(padded, requires_grad=False))
    return layer
