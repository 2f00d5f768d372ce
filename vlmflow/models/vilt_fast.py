"""ViLT's ordinary checkpoints, run by our own code: equal results, less time.

The modules of transformers hold the weights; attention is ours. What is saved, and where:

* the patches of an image are embedded once for all its questions, and stay in order: transformers shuffles them in a
  loop over the images, and attention does not mind;
* attention is fused, and pairs pass in the order of their questions' lengths, so that little is padded;
* the last layer is computed for the first token alone, from which the answer is read;
* on processors, weights are packed once for oneDNN, and pairs pass the layers a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmflow.errors import WeightsError
from vlmflow.models.attention import attend_fused, growing, split_heads
from vlmflow.models.blocks import TOKENS_AT_ONCE, Block, Blocks
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm
from vlmflow.models.patches import Patches
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.upload import numbers

# Pairs that pass all layers together on a GPU.
_PAIRS_AT_ONCE = 256


class ViltTower:
    """The weights of a ``ViltForQuestionAnswering``, for pixels of one size.

    N images of T tokens (their patches, and one before them), M pairs of an image and a question of L tokens, D
    dimensions, C answers. What is carried from layer to layer, and what follows the last, is float32 whatever the dtype
    of the weights: the products of the layers alone are in that.
    """

    def __init__(self, model: Any, normalize: PixelNormalizer, size: int) -> None:
        """``model``: a ``ViltForQuestionAnswering``; ``size``: side of its pixels.

        Raises:
            WeightsError: pixels of this size do not divide into the model's patches, or it has no layers.
        """
        config, embeddings = model.config, model.vilt.embeddings
        self.max_tokens: int = config.max_position_embeddings
        self._normalize = normalize
        kinds = _floats(embeddings.token_type_embeddings.weight)
        text = embeddings.text_embeddings
        self._words, self._text_norm, self._text_kind = text.word_embeddings, Norm(text.LayerNorm), kinds[0]
        self._text_positions = _floats(text.position_embeddings.weight) + _floats(text.token_type_embeddings.weight)[0]
        self._patches = Patches(embeddings.patch_embeddings.projection)
        positions = _positions(_floats(embeddings.position_embeddings), config, size) + kinds[1]
        self._begin, self._positions = _floats(embeddings.cls_token) + positions[:, :1], positions[:, 1:]
        if config.num_hidden_layers < 1:
            raise WeightsError(
                "weights: config.json: num_hidden_layers is 0, and a ViLT without layers sees no image",
                remedy="Copy config.json again from where the model was published: 12 for ViLT.",
            )
        *layers, last = model.vilt.encoder.layer
        self._last = _LastLayer(last, config)
        self._layers = Blocks([_block(layer, config, ["query", "key", "value"]) for layer in layers], self._last.norm)
        self._head = _Head(model)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, T, D) float32, for any number of questions.

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        patches = self._patches(self._normalize(pixels)) + self._positions
        return torch.cat([self._begin.expand(len(patches), -1, -1), patches], dim=1)

    def logits(self, images: torch.Tensor, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Asks the question ``ids[i]`` about the image ``rows[i]``.

        Args:
            images: (N, T, D) as embedded.
            rows: M, at least one.
            ids: the tokens of M questions, at most ``max_tokens`` each.

        Returns:
            (M, C) float32, in the order of the pairs.
        """
        order = sorted(range(len(ids)), key=lambda pair: len(ids[pair]))
        at_once = _PAIRS_AT_ONCE
        if not images.is_cuda:
            at_once = max(1, TOKENS_AT_ONCE // (images.shape[1] + len(ids[order[-1]])))
        found = []
        with growing(images.device):
            for start in range(0, len(order), at_once):
                pairs = order[start : start + at_once]
                asked_of = numbers([rows[pair] for pair in pairs], images.device)
                found.append(self._ask(images[asked_of], [ids[pair] for pair in pairs]))
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(found)[numbers(places, images.device)]

    def _ask(self, images: torch.Tensor, ids: list[Sequence[int]]) -> torch.Tensor:
        """(M, T, D), and the tokens of M questions, the longest at the end -> (M, C)."""
        length, device = len(ids[-1]), images.device
        tokens = numbers([[*asked, *[0] * (length - len(asked))] for asked in ids], device)
        texts = self._text_norm(self._words(tokens) + self._text_positions[:length]) + self._text_kind
        states = torch.cat([texts, images], dim=1)
        visible = None
        if len(ids[0]) < length:
            lengths = numbers([len(asked) for asked in ids], device)
            is_word = torch.arange(length, device=device) < lengths.unsqueeze(1)
            visible = torch.cat([is_word, is_word.new_ones(images.shape[:2])], dim=1)[:, None, None]
        states, normed = self._layers(states, visible, num_kept=1)
        return self._head(*self._last(states, normed, visible))


class _LastLayer:
    """The last layer: its first token sees all, and nothing else of it is seen."""

    def __init__(self, layer: Any, config: Any) -> None:
        self._block = _block(layer, config, ["key", "value"])
        self._query = PackedLinear([layer.attention.attention.query])
        self.norm = self._block.norm1

    def __call__(
        self, states: torch.Tensor, normed: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, 1, D) of the first token, and (M, L + T, D), the norm of all -> (M, 1, D) twice, to be added."""
        block = self._block
        keys, values = split_heads(block.project(normed), block.num_heads, 2)
        (queries,) = split_heads(self._query(normed[:, :1]), block.num_heads, 1)
        return block.finish(states, block.attention(queries, keys, values, visible))


class _Head:
    """From the first token to the answers; in float32, where it costs next to nothing and scores keep their digits."""

    def __init__(self, model: Any) -> None:
        hidden, norm, self._activation, answers = model.classifier
        self._norm, self._hidden_norm = Norm(model.vilt.layernorm), Norm(norm)
        self._pool = PackedLinear([model.vilt.pooler.dense], dtype=torch.float32)
        self._hidden, self._answers = (PackedLinear([layer], dtype=torch.float32) for layer in (hidden, answers))

    def __call__(self, states: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """(M, 1, D) both -> (M, C)."""
        normed = self._norm.of_sum(states, added)[:, 0]
        hidden = self._hidden_norm(self._hidden(self._pool(normed).tanh()))
        return self._answers(self._activation(hidden))


def _block(layer: Any, config: Any, projections: list[str]) -> Block:
    attention = layer.attention.attention
    dtype = layer.output.dense.weight.dtype  # what is normalised goes into products alone
    return Block(
        config.num_attention_heads,
        Norm(layer.layernorm_before, dtype),
        PackedLinear([getattr(attention, name) for name in projections]),
        PackedLinear([layer.attention.output.dense]),
        Norm(layer.layernorm_after, dtype),
        PackedLinear([layer.intermediate.dense], config.hidden_act),
        PackedLinear([layer.output.dense]),
        # By products a processor would be a twentieth faster in bfloat16, with over 1% of scores more than 0.01 off.
        attend_fused,
    )


def _floats(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float()


def _positions(embeddings: torch.Tensor, config: Any, size: int) -> torch.Tensor:
    """(1, T, D): the positions of the patches of a square of ``size``, interpolated as transformers does."""
    side, wanted = config.image_size // config.patch_size, size // config.patch_size
    if wanted * config.patch_size != size:
        raise WeightsError(
            f"weights: pixels of side {size} do not divide into patches of {config.patch_size}",
            remedy="Use the preprocessor_config.json that belongs to these weights.",
        )
    begin, grid = embeddings[:, :1], embeddings[:, 1:]
    grid = grid.transpose(1, 2).reshape(1, -1, side, side)
    grid = nn.functional.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=True)
    return torch.cat([begin, grid.flatten(2).transpose(1, 2)], dim=1)
