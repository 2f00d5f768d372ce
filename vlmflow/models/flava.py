"""FLAVA: embeddings and image-text matching (Singh et al. 2022, arXiv:2112.04482).

A vision tower and a text tower meet in a contrastive space, and once more in a multimodal encoder, over whose class
token the matching head sits. N: images or texts, T: patches and the class token, L: tokens of a text, D: dimensions.
transformers has eager attention alone for FLAVA.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import FlavaConfig, FlavaForPreTraining

from vlmflow.config import Dtype, ModelConfig
from vlmflow.models import EncodedImages
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import load_config, load_model, load_text_tokenizer, tokenize
from vlmflow.models.towers import SharedTower, VisionTowers, content_of
from vlmflow.models.vectors import TEXTS_AT_ONCE, cosines, to_unit
from vlmflow.models.weights import check_keys

logger = logging.getLogger("vlmflow")

# Of pretraining: they fill in what was masked, and nobody asks for that here.
_UNUSED = ("image_codebook.", "mim_head.", "mlm_head.", "mmm_image_head.", "mmm_text_head.")
_ITM_HEAD = "itm_head."


class FlavaEmbedder:
    """Images and texts as unit vectors of the contrastive space.

    Attributes:
        dim: D.
        tower: (N, 3, S, S) uint8 RGB -> (N, T, D): after the vision tower, before its last normalisation. A matcher of
            a worker has the same.
        flava: a ``FlavaModel``.
        itm_head: the matching head of a ``FlavaForPreTraining``; None: the checkpoint has none.
    """

    def __init__(self, flava: Any, itm_head: Any, tokenizer: Any, normalizer: PixelNormalizer) -> None:
        """Takes a model apart; the attributes say into what."""
        self.flava, self.itm_head = flava, itm_head
        self._tokenizer, self._normalize = tokenizer, normalizer
        self.tower = SharedTower(self._encode)
        self._max_tokens: int = flava.config.text_config.max_position_embeddings
        self.dim: int = flava.config.projection_dim

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> FlavaEmbedder:
        """Loads a ``FlavaModel`` or a ``FlavaForPreTraining`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        wanted, preprocessing = model_dtype(device, dtype), read_preprocessing(folder, config)

        def load() -> FlavaEmbedder:
            model, has_head = _load(folder, wanted, device)
            normalizer = PixelNormalizer(preprocessing, device, wanted)
            head = model.itm_head.to(device) if has_head else None
            tokenizer = load_text_tokenizer(folder, model.flava.config.text_config.vocab_size)
            return cls(model.flava.to(device), head, tokenizer, normalizer)

        if towers is None:
            return load()
        return towers.share_model(content_of(folder, config, preprocessing, device, wanted), load)

    @torch.inference_mode()
    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, D) unit vectors."""
        return to_unit(self.image_features(self.tower(pixels)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors; a text longer than the model's context is cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate([to_unit(self.text_features(self.text_states(part)[0])) for part in parts])

    def image_features(self, states: torch.Tensor) -> torch.Tensor:
        """(N, T, D) of the tower -> (N, D) in the contrastive space."""
        features: torch.Tensor = self.flava.image_projection(self.flava.image_model.layernorm(states[:, 0]))
        return features

    def text_states(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """N texts -> (N, L, D) before the last normalisation; and (N, L), 1 where there is no padding."""
        tower = self.flava.text_model
        tokens, mask = tokenize(self._tokenizer, texts, self._max_tokens, str(tower.device))
        outputs = tower(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return outputs.hidden_states[-1], mask

    def text_features(self, states: torch.Tensor) -> torch.Tensor:
        """(N, L, D) of :meth:`text_states` -> (N, D) in the contrastive space."""
        features: torch.Tensor = self.flava.text_projection(self.flava.text_model.layernorm(states[:, 0]))
        return features

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.flava.image_model
        states: torch.Tensor = tower.encoder(tower.embeddings(self._normalize(pixels))).last_hidden_state
        return states


class FlavaMatcher:
    """How well texts fit images: by the contrastive space, and by the matching head of checkpoints that have it."""

    def __init__(self, embedder: FlavaEmbedder) -> None:
        self._embedder = embedder
        flava = embedder.flava
        self._multimodal = flava.multimodal_model
        self._image_projection, self._text_projection = flava.image_to_mm_projection, flava.text_to_mm_projection

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> FlavaMatcher:
        """Loads a ``FlavaForPreTraining`` from a folder, or a ``FlavaModel``, which has no matching head.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        embedder = FlavaEmbedder.load(folder, config, device, dtype, towers)
        if embedder.itm_head is None:
            logger.warning("match: %s has no matching head: caption_itm and text_itm stay null", folder.name)
        return cls(embedder)

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the two heads."""
        return EncodedImages(self._embedder.tower(pixels))

    @torch.inference_mode()
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """Scores ``texts[i]`` against image i with the matching head, over all patches and all words.

        Returns:
            (N,) the probability of a match; None: the checkpoint has no such head.

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        if self._embedder.itm_head is None:
            return None
        states, mask = self._embedder.text_states(texts)
        both = torch.cat([self._image_projection(images.embeds), self._text_projection(states)], dim=1)
        num_seen = both.shape[1] - states.shape[1] + int(self._multimodal.use_cls_token)
        mask = torch.cat([mask.new_ones(len(mask), num_seen), mask], dim=1)
        logits = self._embedder.itm_head(self._multimodal(both, attention_mask=mask).last_hidden_state)
        probabilities: NDArray[np.float32] = logits.float().softmax(dim=1)[:, 1].cpu().numpy()  # column 1 is "match"
        return probabilities

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i in the contrastive space.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        states, _ = self._embedder.text_states(texts)
        return cosines(self._embedder.image_features(images.embeds), self._embedder.text_features(states))


def _load(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, bool]:
    """A ``FlavaForPreTraining`` without what pretraining alone needs; and whether its matching head has weights."""
    settings = load_config(FlavaConfig, folder)
    settings.init_codebook = False
    model, missing, unexpected = load_model(FlavaForPreTraining, folder, dtype, device, settings)
    head = [name for name, _ in model.named_parameters() if name.startswith(_ITM_HEAD)]
    has_head = not set(head) <= set(missing)
    optional = _UNUSED if has_head else (*_UNUSED, _ITM_HEAD)
    check_keys(
        folder,
        [name for name in missing if not name.startswith(optional)],
        [name for name in unexpected if not name.startswith(optional)],
    )
    return model, has_head
