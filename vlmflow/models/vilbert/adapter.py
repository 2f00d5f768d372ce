"""ViLBERT as a matcher, as an answerer, and to find what a phrase means.

Where these take pixels they take :class:`Regions` too: those of a model whose regions are columns of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import Answer, EncodedImages
from vlmflow.models.questions import check_paired, check_scores, tokenize
from vlmflow.models.vilbert.layers import Stream
from vlmflow.models.vilbert.load import Parts, load_parts, read_answers
from vlmflow.models.vilbert.model import Encoded
from vlmflow.models.vilbert.regions import Regions
from vlmflow.models.vilbert.tasks import QUESTION, REFERENCE, RETRIEVAL

Images = torch.Tensor | Regions

# Pairs of an image and a text that go through the model together.
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class EncodedRegions(EncodedImages):
    """Regions before any text: ``embeds`` is (N, 1 + R, V)."""

    mask: torch.Tensor | None = None  # (N, 1 + R) bool, False for padding

    def take(self, rows: Sequence[int]) -> EncodedRegions:
        """Those of the given rows."""
        taken = self.stream.take(rows)
        return EncodedRegions(taken.states, mask=taken.mask)

    @property
    def stream(self) -> Stream:
        """As the model takes them."""
        assert self.mask is not None
        return Stream(self.embeds, self.mask)


class VilbertMatcher:
    """How well texts fit images, by the head that was trained for it; there is no contrastive one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> VilbertMatcher:
        """Loads a model with ``vil_logit``, else with the alignment head of pretraining.

        Raises:
            WeightsError: a file is absent or does not fit, or the model has neither head.
        """
        parts = load_parts(folder, device, dtype, ("vil_logit", "cls"))
        if not {"vil_logit", "cls"} & set(parts.model.config.heads):
            raise _lacks(folder, "vil_logit or cls", "match texts")
        return cls(parts)

    @torch.inference_mode()
    def encode_images(self, pixels: Images) -> EncodedRegions:
        """(N, 3, S, S) uint8 RGB, or N images' regions -> N images for texts."""
        stream = self._parts.embed(self._parts.regions_of(pixels))
        return EncodedRegions(stream.states, mask=stream.mask)

    @torch.inference_mode()
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i.

        Of ``vil_logit`` the logistic. The published checkpoints trained it to tell one caption of four, so that it
        orders texts and images and is no calibrated probability.

        Returns:
            (N,) in [0, 1].

        Raises:
            ValueError: the two differ in length.
        """
        assert isinstance(images, EncodedRegions)
        images.pairs_with(texts)
        scores = [np.empty(0, np.float32)]
        for start in range(0, len(texts), _PAIRS_AT_ONCE):
            part = range(start, min(start + _PAIRS_AT_ONCE, len(texts)))
            ids = self._parts.tokenizer(
                [texts[row] for row in part], truncation=True, max_length=self._parts.max_tokens
            )["input_ids"]
            encoded = self._parts.encode(images.stream.take(part), ids, RETRIEVAL)
            scores.append(self._probability(encoded).cpu().numpy())
        return np.concatenate(scores)

    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> None:
        """None: the streams meet in every pair, there is no cosine of each alone."""

    def _probability(self, encoded: Encoded) -> torch.Tensor:
        model = self._parts.model
        if "vil_logit" in model.config.heads:
            logits: torch.Tensor = model.get_submodule("vil_logit")(encoded.pair)
            return logits.float()[:, 0].sigmoid()
        aligned: torch.Tensor = model.get_submodule("cls.bi_seq_relationship")(encoded.pair)
        return aligned.float().softmax(-1)[:, 0]  # column 0 is "belongs to the image"


class VilbertAnswerer:
    """One of the model's answers to each question."""

    def __init__(self, parts: Parts, answers: Sequence[str]) -> None:
        self._parts, self._answers = parts, tuple(answers)

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> VilbertAnswerer:
        """Loads a model with ``vil_prediction`` and its `answers.json`.

        Raises:
            WeightsError: a file is absent or does not fit, or the model lacks the head.
        """
        parts = load_parts(folder, device, dtype, ("vil_prediction",))
        if "vil_prediction" not in parts.model.config.heads:
            raise _lacks(folder, "vil_prediction", "answer questions")
        return cls(parts, read_answers(folder, parts.model.config.num_answers))

    def check_questions(self, questions: Sequence[str]) -> None:
        """See :class:`vlmflow.models.Answerer`."""
        tokenize(self._parts.tokenizer, questions, self._parts.max_tokens)

    @torch.inference_mode()
    def answer(self, pixels: Images, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`.

        The score is the logistic of the answer's output, which was trained towards the share of people who gave it.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        texts = [question for asked in questions for question in asked]
        ids = tokenize(self._parts.tokenizer, texts, self._parts.max_tokens)
        if not rows:
            return [[] for _ in questions]
        regions = self._parts.embed(self._parts.regions_of(pixels))
        found = []
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            encoded = self._parts.encode(regions.take(rows[part]), ids[part], QUESTION)
            logits = self._parts.model.get_submodule("vil_prediction")(encoded.pair)
            best = logits.float().sigmoid().max(dim=-1)
            numbers, scores = best.indices.tolist(), best.values.tolist()
            check_scores(scores)
            found += [Answer(self._answers[number], score) for number, score in zip(numbers, scores, strict=True)]
        given = iter(found)
        return [[next(given) for _ in asked] for asked in questions]


@dataclass(frozen=True)
class Grounding:
    """What a phrase may mean in an image, the likeliest region first.

    Attributes:
        boxes: (R, 4) float32: left, top, right, bottom, as parts of the image.
        scores: (R,) float32 in [0, 1]: the logistic of the region's output, trained towards its overlap with the thing.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


class VilbertGrounder:
    """Finds the region that a phrase means, as for referring expressions."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: Dtype = "auto") -> VilbertGrounder:
        """Loads a model with ``vision_logit``.

        Raises:
            WeightsError: a file is absent or does not fit, or the model lacks the head.
        """
        parts = load_parts(folder, device, dtype, ("vision_logit",))
        if "vision_logit" not in parts.model.config.heads:
            raise _lacks(folder, "vision_logit", "find what a phrase means")
        return cls(parts)

    @torch.inference_mode()
    def ground(self, pixels: Images, phrases: Sequence[Sequence[str]]) -> list[list[Grounding]]:
        """Finds what each of ``phrases[i]`` means in image i; the regions of an image are found once.

        Raises:
            QuestionError: a phrase is longer than the model can take.
            ValueError: the two differ in length.
        """
        check_paired(len(pixels), phrases)
        rows = [row for row, asked in enumerate(phrases) for _ in asked]
        texts = [phrase for asked in phrases for phrase in asked]
        ids = tokenize(self._parts.tokenizer, texts, self._parts.max_tokens)
        if not rows:
            return [[] for _ in phrases]
        regions = self._parts.regions_of(pixels)
        embedded = self._parts.embed(regions)
        found: list[Grounding] = []
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            encoded = self._parts.encode(embedded.take(rows[part]), ids[part], REFERENCE)
            # The first is the whole image, which stands for all of them and is no answer.
            logits = self._parts.model.get_submodule("vision_logit")(encoded.regions[:, 1:])
            scores = logits.float()[..., 0].sigmoid().cpu()
            found += [_ranked(regions, row, score) for row, score in zip(rows[part], scores, strict=True)]
        given = iter(found)
        return [[next(given) for _ in asked] for asked in phrases]


def _ranked(regions: Regions, row: int, scores: torch.Tensor) -> Grounding:
    mask = regions.mask[row].cpu()
    best = scores[mask].argsort(descending=True, stable=True)
    return Grounding(regions.boxes[row].cpu()[mask][best].numpy(), scores[mask][best].numpy())


def _lacks(folder: Path, head: str, purpose: str) -> WeightsError:
    return WeightsError(
        f"weights: {folder} has no {head}: it was not trained to {purpose}", remedy="Use a multi-task checkpoint."
    )
