"""BLIP captioning and image-text matching (Li et al. 2022, arXiv:2201.12086)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from vlmflow.config import Dtype, ModelConfig
from vlmflow.models import EncodedImages
from vlmflow.models.attention import growing
from vlmflow.models.blip_fast import GreedyDecoder, SpecialTokens, TextTower, decode_beams
from vlmflow.models.generation import check_settings
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import load_model, load_tokenizer
from vlmflow.models.towers import SharedTower, VisionTowers
from vlmflow.models.upload import numbers
from vlmflow.models.weights import check_keys

# Texts of up to so many tokens are taken together: more groups would have less of a device's work each.
_SHORT = 16


class BlipCaptioner:
    """One sentence for each image, a whole batch at once; two threads may each have one at work.

    Of all tasks of a pool captions take the longest, with many small steps: one batch after the other, they were at
    work for nine tenths of a job on an H100, of which the device idled one tenth.
    """

    batches_at_once = 2

    def __init__(self, model: Any, tokenizer: Any, vision: SharedTower) -> None:
        """``model``: a ``BlipForConditionalGeneration``, whose weights are used, and whose vision tower is not."""
        config = model.config.text_config
        self._tokenizer = tokenizer
        self._vision = vision
        self._decoder = TextTower(model.text_decoder.bert, model.text_decoder.cls)
        self._special = SpecialTokens.of(config)
        self._decode_greedily = GreedyDecoder(self._decoder, self._special)

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> BlipCaptioner:
        """Loads ``BlipForConditionalGeneration`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit, or the configuration sets how captions are decoded.
        """
        model, *others = load_parts(BlipForConditionalGeneration, folder, config, Target(device, dtype, towers))
        check_settings(folder, model.text_decoder.generation_config)
        return cls(model, *others)

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions of at most ``max_tokens`` tokens.

        Args:
            pixels: of the model's size.
            max_tokens: the end of a caption counted.
            num_beams: 1: greedy decoding; more: beam search, the best of so many captions.

        Raises:
            ValueError: the pixels are not of the model's size or dtype, there is to be no token or no beam, or the
                model makes of an image what is no number.
        """
        if max_tokens < 1 or num_beams < 1:
            raise ValueError(f"captions of {max_tokens} tokens by {num_beams} beams; both must be at least 1")
        if len(pixels) == 0:
            return []
        images = self._vision(pixels)
        is_finite = images.sum(dtype=torch.float32).isfinite()  # read behind the captions: until then nothing waits
        if num_beams == 1:
            tokens = self._decode_greedily(images, max_tokens)
        else:
            with growing(images.device):
                tokens = decode_beams(self._decoder, self._special, images, max_tokens, num_beams)
        if not is_finite:  # whose caption would be some word, or none
            raise ValueError("the model gave features that are not finite")
        texts: list[str] = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


class BlipMatcher:
    """How well texts fit images, by the matching head and by the contrastive heads."""

    def __init__(self, model: Any, tokenizer: Any, vision: SharedTower) -> None:
        """``model``: a ``BlipForImageTextRetrieval``, whose weights are used, and whose vision tower is not."""
        self._tokenizer = tokenizer
        self._vision = vision
        self._encoder = TextTower(model.text_encoder, image_dtype=model.vision_model.dtype)
        self._itm_head = model.itm_head
        self._threads = threading.local()
        self._vision_proj, self._text_proj = model.vision_proj, model.text_proj

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> BlipMatcher:
        """Loads ``BlipForImageTextRetrieval`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        # A text has a hundredth of an image's tokens: in float32 it costs little, and scores keep their second digit.
        return cls(*load_parts(BlipForImageTextRetrieval, folder, config, Target(device, dtype, towers, torch.float32)))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the two heads."""
        return EncodedImages(self._vision(pixels))

    @torch.inference_mode()
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the matching head, which attends to the patches.

        Returns:
            (N,) the probability of a match.

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        logits = self._itm_head(self._encode(texts, images.embeds))
        probabilities: NDArray[np.float32] = logits.softmax(dim=1)[:, 1].cpu().numpy()  # column 1 is "match"
        return probabilities

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the contrastive heads, which see each alone.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        text_features = self._text_proj(self._encode(texts, None))
        image_features = self._vision_proj(images.embeds[:, 0].float())
        return torch.nn.functional.cosine_similarity(image_features, text_features, dim=-1).cpu().numpy()

    def _encode(self, texts: Sequence[str], features: torch.Tensor | None) -> torch.Tensor:
        """(N, D) float32: the first token of each text."""
        last: tuple[list[str], list[_Texts]] | None = getattr(self._threads, "last", None)
        if last is None or last[0] != list(texts):  # both heads are asked about the same
            self._threads.last = last = (list(texts), self._tokens(texts))
        groups, found = last[1], []
        for group in groups:
            shown = features
            if features is not None and len(groups) > 1:
                shown = features[numbers(group.rows, features.device)]
            found.append(self._encoder.encode(group.ids, group.mask, shown)[:, 0])
        if len(groups) == 1:
            return found[0]
        rows = [row for group in groups for row in group.rows]
        places = sorted(range(len(rows)), key=rows.__getitem__)
        return torch.cat(found)[numbers(places, found[0].device)]

    def _tokens(self, texts: Sequence[str]) -> list[_Texts]:
        """The texts by length, to the next power of two: few groups, and no short text padded to the longest."""
        all_ids: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._encoder.max_tokens)[
            "input_ids"
        ]
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(all_ids):
            by_length.setdefault(max(_SHORT, 1 << (len(ids) - 1).bit_length()), []).append(row)
        device = self._itm_head.weight.device
        return [_Texts.of(rows, [all_ids[row] for row in rows], device) for rows in by_length.values()]


@dataclass(frozen=True)
class _Texts:
    """Texts of about one length, L.

    Attributes:
        rows: M, of the texts among all.
        ids: (M, L) int64.
        mask: (M, L) bool, False on padding; None: there is none.
    """

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, rows: list[int], ids: list[list[int]], device: torch.device) -> _Texts:
        """Padded to the longest, by what the mask hides."""
        lengths = [len(tokens) for tokens in ids]
        longest = max(lengths)
        padded = numbers([[*tokens, *[0] * (longest - len(tokens))] for tokens in ids], device)
        if min(lengths) == longest:
            return cls(rows, padded, None)
        is_word = torch.arange(longest, device=device) < numbers(lengths, device).unsqueeze(1)
        return cls(rows, padded, is_word)


@dataclass(frozen=True)
class Target:
    """Where a model is to run, and as what."""

    device: str
    dtype: Dtype
    towers: VisionTowers | None
    text_dtype: torch.dtype | None = None  # None: as the vision tower


def load_parts(model_class: Any, folder: Path, config: ModelConfig, target: Target) -> tuple[Any, Any, SharedTower]:
    """Loads a model of transformers with a BLIP vision tower; its tokenizer, and the tower as the worker shares it.

    Raises:
        WeightsError: the weights are absent or do not fit.
    """
    dtype = model_dtype(target.device, target.dtype)
    model, missing, unexpected = load_model(model_class, folder, target.text_dtype or dtype, target.device)
    check_keys(folder, missing, unexpected)
    normalize = PixelNormalizer(read_preprocessing(folder, config), target.device, dtype)
    model.vision_model.to(dtype)
    model = model.to(target.device)
    towers = target.towers or VisionTowers()
    tokenizer = load_tokenizer(folder, model.config.text_config.vocab_size)
    return model, tokenizer, towers.share(model.vision_model, normalize)
