"""BLIP captioning and image-text matching (Li et al. 2022, arXiv:2201.12086)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import EncodedImages
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.weights import check_keys


class BlipCaptioner:
    """One sentence for each image, by greedy decoding of a whole batch at once."""

    def __init__(self, model: Any, tokenizer: Any, normalize: PixelNormalizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._normalize = normalize

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str) -> BlipCaptioner:
        """Loads ``BlipForConditionalGeneration`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        return cls(*_load(BlipForConditionalGeneration, folder, config, device))

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, max_tokens: int) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions of at most ``max_tokens`` tokens."""
        if len(pixels) == 0:
            return []
        image_embeds = self._model.vision_model(pixel_values=self._normalize(pixels)).last_hidden_state
        tokens = self._decode_greedily(image_embeds, max_tokens)
        texts: list[str] = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _decode_greedily(self, image_embeds: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """(N, T, D) -> (N, at most ``max_tokens``) token ids, padded after the end of each caption.

        The same tokens as ``generate(do_sample=False)``, without its bookkeeping, which costs more than a small
        decoder does.
        """
        config = self._model.config.text_config
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        num_images, device = len(image_embeds), image_embeds.device
        tokens = torch.full((num_images, 1), config.bos_token_id, device=device)
        running = torch.ones(num_images, dtype=torch.bool, device=device)
        generated: list[torch.Tensor] = []
        for _ in range(max_tokens):
            outputs = self._model.text_decoder(
                input_ids=tokens, encoder_hidden_states=image_embeds, past_key_values=cache, use_cache=True
            )
            best = outputs.logits[:, -1].float().argmax(dim=-1)
            tokens = torch.where(running, best, config.pad_token_id).unsqueeze(1)
            generated.append(tokens)
            running &= best != config.sep_token_id
            if not running.any():
                break
        return torch.cat(generated, dim=1)


class BlipMatcher:
    """How well texts fit images, by the matching head and by the contrastive heads."""

    def __init__(self, model: Any, tokenizer: Any, normalize: PixelNormalizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._normalize = normalize

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str) -> BlipMatcher:
        """Loads ``BlipForImageTextRetrieval`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        return cls(*_load(BlipForImageTextRetrieval, folder, config, device))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the two heads."""
        return EncodedImages(self._model.vision_model(pixel_values=self._normalize(pixels)).last_hidden_state)

    @torch.inference_mode()
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the matching head, which attends to the patches.

        Returns:
            (N,) the probability of a match.

        Raises:
            ValueError: the two differ in length.
        """
        if not _paired(images, texts):
            return np.empty(0, np.float32)
        states = self._model.text_encoder(
            **self._tokenize(texts, images), encoder_hidden_states=images.embeds
        ).last_hidden_state
        logits = self._model.itm_head(states[:, 0])
        probabilities: NDArray[np.float32] = logits.float().softmax(dim=1)[:, 1].cpu().numpy()  # column 1 is "match"
        return probabilities

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the contrastive heads, which see each alone.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not _paired(images, texts):
            return np.empty(0, np.float32)
        states = self._model.text_encoder(**self._tokenize(texts, images)).last_hidden_state
        text_features = self._model.text_proj(states[:, 0]).float()
        image_features = self._model.vision_proj(images.embeds[:, 0]).float()
        return torch.nn.functional.cosine_similarity(image_features, text_features, dim=-1).cpu().numpy()

    def _tokenize(self, texts: Sequence[str], images: EncodedImages) -> dict[str, torch.Tensor]:
        batch = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(images.embeds.device)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _paired(images: EncodedImages, texts: Sequence[str]) -> bool:
    """Whether there is any pair."""
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} texts")
    return len(texts) > 0


def _load(model_class: Any, folder: Path, config: ModelConfig, device: str) -> tuple[Any, Any, PixelNormalizer]:
    dtype = model_dtype(device)
    try:
        with _no_progress_bar():
            model, found = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        # trust_remote_code must be given: left out, transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes that differ
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"weights: {folder} cannot be loaded as {model_class.__name__}: {reason}",
            remedy="Copy the model's whole folder: configuration, safetensors and tokenizer that belong together.",
        ) from error
    check_keys(folder, found["missing_keys"], found["unexpected_keys"])
    normalize = PixelNormalizer(read_preprocessing(folder, config), device, dtype)
    return model.to(device).eval().requires_grad_(False), tokenizer, normalize


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar on standard error for every model that a worker loads."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
