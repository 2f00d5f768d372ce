"""ALIGN: embeddings and contrastive matching (Jia et al. 2021, arXiv:2102.05918).

An EfficientNet and a BERT that meet in a contrastive space and nowhere else: there is no matching head, so that
``caption_itm`` and ``text_itm`` of rows that ALIGN matched are null. N: images or texts, D: dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AlignModel

from vlmflow.config import Dtype, ModelConfig
from vlmflow.models import EncodedImages
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import load_model, load_text_tokenizer, tokenize
from vlmflow.models.vectors import TEXTS_AT_ONCE, cosines, to_unit
from vlmflow.models.weights import check_keys

logger = logging.getLogger("vlmflow")


class AlignEmbedder:
    """Images and texts as unit vectors of the contrastive space."""

    def __init__(self, model: Any, tokenizer: Any, normalizer: PixelNormalizer) -> None:
        """``model``: an ``AlignModel``."""
        self._model, self._tokenizer, self._normalize = model, tokenizer, normalizer
        self._max_tokens: int = model.config.text_config.max_position_embeddings
        self.dim: int = model.config.projection_dim

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> AlignEmbedder:
        """Loads an ``AlignModel`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        wanted = model_dtype(device, dtype)
        model, missing, unexpected = load_model(AlignModel, folder, wanted)
        check_keys(folder, missing, unexpected)
        normalizer = PixelNormalizer(read_preprocessing(folder, config), device, wanted)
        return cls(model.to(device), load_text_tokenizer(folder), normalizer)

    @torch.inference_mode()
    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, D) unit vectors."""
        return to_unit(self.image_features(pixels))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors; a text longer than the model's context is cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate([to_unit(self.text_features(part)) for part in parts])

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, D) in the contrastive space."""
        features: torch.Tensor = self._model.vision_model(pixel_values=self._normalize(pixels)).pooler_output
        return features

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """N texts -> (N, D) in the contrastive space."""
        tokens, mask = tokenize(self._tokenizer, texts, self._max_tokens, str(self._model.device))
        states = self._model.text_model(input_ids=tokens, attention_mask=mask).last_hidden_state
        features: torch.Tensor = self._model.text_projection(states[:, 0])
        return features


class AlignMatcher:
    """How well texts fit images, by the contrastive space alone."""

    def __init__(self, embedder: AlignEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> AlignMatcher:
        """Loads an ``AlignModel`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        logger.warning("match: ALIGN has no matching head: caption_itm and text_itm stay null")
        return cls(AlignEmbedder.load(folder, config, device, dtype))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the contrastive head."""
        return EncodedImages(self._embedder.image_features(pixels))

    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> None:
        """ALIGN has no matching head.

        Raises:
            ValueError: images and texts differ in number.
        """
        images.pairs_with(texts)

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        return cosines(images.embeds, self._embedder.text_features(texts))
