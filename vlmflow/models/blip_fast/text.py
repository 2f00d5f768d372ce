"""BLIP's text tower: an encoder of texts, or one step of a decoder, with cross-attention to images or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vlmflow.models.attention import attend, split_heads
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm


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

    N texts of L tokens, V words, D dimensions, H heads of d; T tokens of an image.
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
        self._norm = Norm(model.embeddings.LayerNorm)
        self.layers = [_Layer(layer, config, image_dtype) for layer in model.encoder.layer]
        self._head = None if head is None else _Head(head.predictions, config.hidden_act)

    def encode(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, memory: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Runs whole texts, each token of which sees all others.

        Args:
            ids: (N, L) int64.
            mask: (N, L) bool, False on padding; None: there is none.
            memory: of each layer (2, N, H, T, d): the images' keys and values, see :meth:`remember`.

        Returns:
            (N, L, D) float32.
        """
        states = self._norm(self._words(ids) + self._positions[: ids.shape[1]])
        visible = None if mask is None else mask[:, None, None, :]
        for index, layer in enumerate(self.layers):
            queries, keys, values = split_heads(layer.project(states), self.num_heads)
            states = layer.attended(states, attend(queries, keys, values, visible))
            states = layer.finish(states, None if memory is None else memory[index])
        return states

    def step(self, tokens: torch.Tensor, cache: SelfCache, memory: Sequence[torch.Tensor]) -> torch.Tensor:
        """Runs one token of each text.

        Args:
            tokens: (N, B) int64: B beams of each of N images.
            cache: of N * B rows.
            memory: of each layer (2, N, H, T, d); the beams of an image share its keys and values.

        Returns:
            (N, B, V) logits of the next token.
        """
        assert self._head is not None
        states = self._norm(self._words(tokens) + self._positions[cache.position])
        num_images, num_beams = tokens.shape
        for index, layer in enumerate(self.layers):
            context = cache.attend(index, layer.project(states.flatten(0, 1).unsqueeze(1)), self.num_heads)
            states = layer.attended(states, context.view(num_images, num_beams, -1))
            states = layer.finish(states, memory[index])
        return self._head(states)

    def remember(self, images: torch.Tensor, out: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Keys and values of images for the cross-attention of all layers.

        Args:
            images: (N, T, D) features of the vision tower.
            out: of each layer (N, T, 2 D), where to write; None: into new memory.

        Returns:
            Of each layer (2, N, H, T, d).
        """
        if out is not None:
            for layer, kept in zip(self.layers, out, strict=True):
                layer.remember.into(kept, images)
            return [self.as_memory(kept) for kept in out]
        if images.is_cuda:  # attention takes them as they come
            return [self.as_memory(layer.remember(images)) for layer in self.layers]
        num_images, num_tokens = images.shape[:2]
        memory: list[torch.Tensor] = []
        for layer in self.layers:
            kept = images.new_empty((2, num_images, self.num_heads, num_tokens, self.width // self.num_heads))
            for row in range(num_images):  # one by one, so that what is to be put in order is still in the cache
                kept[:, row] = self.as_memory(layer.remember(images[row : row + 1]))[:, 0]
            memory.append(kept)
        return memory

    def as_memory(self, projected: torch.Tensor) -> torch.Tensor:
        """(N, T, 2 D) -> (2, N, H, T, d) of the same memory."""
        return projected.view(*projected.shape[:2], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)


class CrossMemory:
    """Keys and values of encoded images, computed when a text first asks, and shared by all that ask later."""

    def __init__(self, tower: TextTower, images: torch.Tensor) -> None:
        """``images``: (N, T, D) features of the vision tower."""
        self._tower = tower
        self._images = images
        self._memory: list[torch.Tensor] | None = None

    def of(self, rows: Sequence[int] | None) -> list[torch.Tensor]:
        """Of each layer (2, rows, H, T, d); None: all rows."""
        if rows is None:
            return self._of_all()
        if self._memory is None and 2 * len(set(rows)) < len(self._images):
            # Few have a text at all: the others' would never be read.
            return self._tower.remember(self._images[list(rows)])
        index = torch.tensor(list(rows), device=self._images.device)
        return [kept.index_select(1, index) for kept in self._of_all()]

    def _of_all(self) -> list[torch.Tensor]:
        if self._memory is None:
            self._memory = self._tower.remember(self._images)
        return self._memory


class _Layer:
    """Attend to the text, attend to the image, expand and contract; each added to its input and normalised."""

    def __init__(self, layer: Any, config: Any, image_dtype: torch.dtype | None) -> None:
        attention, self._num_heads = layer.attention, config.num_attention_heads
        self.project = PackedLinear([attention.self.query, attention.self.key, attention.self.value])
        self._out, self._out_norm = PackedLinear([attention.output.dense]), Norm(attention.output.LayerNorm)
        cross = getattr(layer, "crossattention", None)
        if cross is not None:
            self._cross_query = PackedLinear([cross.self.query])
            self.remember = PackedLinear([cross.self.key, cross.self.value], dtype=image_dtype)
            self._cross_out, self._cross_norm = PackedLinear([cross.output.dense]), Norm(cross.output.LayerNorm)
        self._expand = PackedLinear([layer.intermediate.dense], config.hidden_act)
        self._contract, self._norm = PackedLinear([layer.output.dense]), Norm(layer.output.LayerNorm)

    def attended(self, states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What follows self-attention, on (N, L, D) both."""
        return self._out_norm.of_sum(states, self._out(context))

    def finish(self, states: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """Cross-attention and the two linear layers: (N, L, D) -> the same; ``memory``: (2, N, H, T, d)."""
        if memory is not None:
            (queries,) = split_heads(self._cross_query(states), self._num_heads, 1)
            context = attend(queries.to(memory.dtype), memory[0], memory[1])
            states = self._cross_norm.of_sum(states, self._cross_out(context))
        return self._norm.of_sum(states, self._contract(self._expand(states)))


class _Head:
    """The language modelling head: (..., D) -> (..., V) logits."""

    def __init__(self, predictions: Any, activation: str) -> None:
        self._transform = PackedLinear([predictions.transform.dense], activation)
        self._norm = Norm(predictions.transform.LayerNorm)
        self._words = PackedLinear([predictions.decoder])

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self._words(self._norm(self._transform(states)))
