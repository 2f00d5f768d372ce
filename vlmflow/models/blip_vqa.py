"""BLIP question answering (Li et al. 2022, arXiv:2201.12086): an encoder reads the question, a decoder writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from transformers import BlipForQuestionAnswering

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import Answer
from vlmflow.models.attention import growing
from vlmflow.models.blip import Target, load_parts
from vlmflow.models.blip_fast import SpecialTokens, TextTower
from vlmflow.models.blip_fast.cache import SlicedCache
from vlmflow.models.generation import check_settings
from vlmflow.models.questions import check_paired, check_scores, tokenize
from vlmflow.models.towers import SharedTower
from vlmflow.models.upload import numbers

_MAX_ANSWER_TOKENS = 20  # the end counted
_PAIRS_AT_ONCE = 256  # of an image and a question


class BlipAnswerer:
    """Writes an answer to each question, greedily. N: images, M: pairs of image and question, L: tokens of each."""

    def __init__(self, model: Any, tokenizer: Any, vision: SharedTower) -> None:
        """``model``: a ``BlipForQuestionAnswering``, whose weights are used, and whose vision tower is not."""
        config = model.config.text_config
        self._tokenizer, self._vision = tokenizer, vision
        self._encoder = TextTower(model.text_encoder)
        self._decoder = TextTower(model.text_decoder.bert, model.text_decoder.cls)
        self._special = SpecialTokens.of(config)

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: Any | None = None
    ) -> Self:
        """Loads ``BlipForQuestionAnswering`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit, or the configuration sets how answers are decoded.
        """
        model, *others = load_parts(BlipForQuestionAnswering, folder, config, Target(device, dtype, towers))
        check_settings(folder, model.text_decoder.generation_config)
        seen, read = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        if seen != read:  # the decoder looks at what the encoder made of the question, as if it were an image
            raise WeightsError(
                f"weights: {folder / 'config.json'}: a BLIP that answers has one width, not hidden_size {seen} of "
                f"vision_config and {read} of text_config",
                remedy="Use weights and configuration of one model, such as Salesforce/blip-vqa-base.",
            )
        return cls(model, *others)

    def check_questions(self, questions: Sequence[str]) -> None:
        """See :class:`vlmflow.models.Answerer`."""
        tokenize(self._tokenizer, questions, self._encoder.max_tokens)

    @torch.inference_mode()
    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`.

        The score is the probability of all tokens of the answer, its end included. Questions of one length are taken
        together: a decoder of BLIP attends to padding too, so an answer would depend on what stood beside it.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        ids = tokenize(
            self._tokenizer, [question for asked in questions for question in asked], self._encoder.max_tokens
        )
        if not rows:
            return [[] for _ in questions]
        images = self._vision(pixels)
        found: list[Answer | None] = [None] * len(rows)
        for pairs in _of_one_length(ids):
            tokens = numbers([ids[pair] for pair in pairs], images.device)
            asked_of = numbers([rows[pair] for pair in pairs], images.device)
            with growing(images.device):
                states = self._encoder.encode(tokens, None, images[asked_of])
                answers = self._decode(states.to(images.dtype))
            for pair, answer in zip(pairs, answers, strict=True):
                found[pair] = answer
        given = iter(found)
        return [[cast(Answer, next(given)) for _ in asked] for asked in questions]

    def _decode(self, states: torch.Tensor) -> list[Answer]:
        """(M, L, D) of the encoder -> M answers: the most probable token at every step."""
        special = self._special
        steps = min(_MAX_ANSWER_TOKENS, self._decoder.max_tokens)
        cache = SlicedCache(len(self._decoder.layers), steps)
        tokens = torch.full((len(states),), special.begin, device=states.device)
        running = torch.ones(len(states), dtype=torch.bool, device=states.device)
        total = torch.zeros(len(states), device=states.device)
        decoded = []
        for step in range(steps):
            cache.position = step
            logits = self._decoder.step(tokens.unsqueeze(1), cache, states)[:, 0].float()
            best = logits.log_softmax(dim=-1).max(dim=-1)
            total += torch.where(running, best.values, 0.0)
            tokens = torch.where(running, best.indices, special.pad)
            decoded.append(tokens)
            running = running & (tokens != special.end)
            if not bool(running.any()):
                break
        texts = self._tokenizer.batch_decode(torch.stack(decoded, dim=1), skip_special_tokens=True)
        scores = [math.exp(logarithm) for logarithm in total.tolist()]
        check_scores(scores)
        return [Answer(text.strip(), score) for text, score in zip(texts, scores, strict=True)]


def _of_one_length(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The pairs, in groups of equally long questions and bounded size."""
    by_length: dict[int, list[int]] = {}
    for pair, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(pair)
    return [
        group[start : start + _PAIRS_AT_ONCE]
        for group in by_length.values()
        for start in range(0, len(group), _PAIRS_AT_ONCE)
    ]
