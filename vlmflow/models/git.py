"""GIT captioning (Wang et al. 2022, arXiv:2205.14100): one decoder over words and the patches of a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GitForCausalLM

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models.generation import check_settings
from vlmflow.models.logits import NumberCheck
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import captioning, load_model, load_tokenizer
from vlmflow.models.weights import check_keys

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class GitCaptioner:
    """One sentence for each image, a whole batch at once. transformers has eager attention alone for GIT."""

    def __init__(self, model: Any, tokenizer: Any, normalizer: PixelNormalizer) -> None:
        """``model``: a ``GitForCausalLM``."""
        self._model, self._tokenizer, self._normalize = model, tokenizer, normalizer

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> GitCaptioner:
        """Loads ``GitForCausalLM`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit, or are those of a model of videos; or nothing says how
                a caption begins, or the files set how it is decoded, or contradict each other in that.
        """
        wanted = model_dtype(device, dtype)
        model, missing, unexpected = load_model(GitForCausalLM, folder, wanted, device)
        check_keys(folder, missing, unexpected)
        if model.config.num_image_with_embedding is not None:
            raise WeightsError(
                f"weights: {folder} captions videos of {model.config.num_image_with_embedding} frames, not images",
                remedy="Use a GIT model of images, such as microsoft/git-large-coco.",
            )
        if model.config.bos_token_id is None:
            raise WeightsError(
                f"weights: {folder / 'config.json'}: bos_token_id is missing, which begins a caption",
                remedy="Set it as the published configuration does: 101.",
            )
        check_settings(folder, model.generation_config)
        # Of what the folder says of decoding the tokens that begin and end a caption are left, by the file of the two
        # that is in its digest.
        tokens = GenerationConfig(**{name: getattr(model.config, name) for name in _TOKENS})
        _check_tokens(folder, model.generation_config, tokens)
        model.generation_config = tokens
        preprocessing = read_preprocessing(folder, config)
        normalizer = PixelNormalizer(preprocessing, device, wanted)
        captioner = cls(model.to(device), load_tokenizer(folder, model.config.vocab_size), normalizer)
        with captioning(folder, preprocessing.size) as pixels:
            captioner.caption(pixels, 1)
        return captioner

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions of at most ``max_tokens`` tokens.

        Args:
            pixels: of the model's size.
            num_beams: 1: greedy decoding; more: beam search, the best of so many captions.

        Raises:
            ValueError: the pixels are not of the model's size or dtype, there is to be no token or no beam, or the
                model gave logits that are not numbers.
        """
        if max_tokens < 1 or num_beams < 1:
            raise ValueError(f"captions of {max_tokens} tokens by {num_beams} beams; both must be at least 1")
        if len(pixels) == 0:
            return []
        numbers = NumberCheck()
        tokens = self._model.generate(
            pixel_values=self._normalize(pixels),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_tokens,
            logits_processor=numbers.as_list(),
        )
        numbers.check()
        return [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _check_tokens(folder: Path, settings: GenerationConfig, tokens: GenerationConfig) -> None:
    """Refuses a folder whose generation_config.json has captions begin or end otherwise than its config.json.

    Raises:
        WeightsError: names the token.
    """
    for name in _TOKENS:
        found, expected = getattr(settings, name), getattr(tokens, name)
        if found is not None and found != expected:
            raise WeightsError(
                f"weights: {folder}: {name} is {found} in generation_config.json, and {expected} in config.json",
                remedy="Write into config.json what the model was trained with, and the same into the other.",
            )
