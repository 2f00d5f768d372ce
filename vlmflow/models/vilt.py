"""ViLT question answering (Kim et al. 2021, arXiv:2102.03334): a choice among the answers that it was trained on.

The checkpoint's own processor keeps the aspect ratio and pads; here the whole image is squashed to a square of the
processor's shorter side, as every model of vlmflow is shown it. For a square image that is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import ViltForQuestionAnswering

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import Answer
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import load_model, load_tokenizer
from vlmflow.models.questions import check_paired, check_scores, tokenize
from vlmflow.models.vilt_fast import ViltTower
from vlmflow.models.weights import check_keys


class ViltAnswerer:
    """One of the model's answers to each question. N: images, M: pairs of image and question, C: answers."""

    def __init__(self, model: Any, tokenizer: Any, normalize: PixelNormalizer, size: int) -> None:
        """``model``: a ``ViltForQuestionAnswering``, whose weights are used; ``size``: side of its pixels.

        Raises:
            WeightsError: pixels of this size do not divide into the model's patches, it has no layers, or an answer
                has no words.
        """
        config = model.config
        self._tokenizer, self._tower = tokenizer, ViltTower(model, normalize, size)
        self._answers = [_answer(config.id2label, number) for number in range(config.num_labels)]
        self._is_multi_label = config.problem_type == "multi_label_classification"

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> Self:
        """Loads ``ViltForQuestionAnswering`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        kind = model_dtype(device, dtype)
        model, missing, unexpected = load_model(ViltForQuestionAnswering, folder, kind, device)
        check_keys(folder, missing, unexpected)
        preprocessing = read_preprocessing(folder, config)
        normalize = PixelNormalizer(preprocessing, device, kind)
        return cls(model.to(device), load_tokenizer(folder, model.config.vocab_size), normalize, preprocessing.size)

    def check_questions(self, questions: Sequence[str]) -> None:
        """See :class:`vlmflow.models.Answerer`."""
        tokenize(self._tokenizer, questions, self._tower.max_tokens)

    @torch.inference_mode()
    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`.

        Scores are softmaxed over all answers, or a sigmoid each where the configuration says that several can hold.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        ids = tokenize(self._tokenizer, [question for asked in questions for question in asked], self._tower.max_tokens)
        if not rows:
            return [[] for _ in questions]
        given = iter(self._choose(self._tower.logits(self._tower.embed(pixels), rows, ids)))
        return [[next(given) for _ in asked] for asked in questions]

    def _choose(self, logits: torch.Tensor) -> list[Answer]:
        """(M, C) -> M answers."""
        scores = logits.sigmoid() if self._is_multi_label else logits.softmax(dim=-1)
        best = scores.max(dim=-1)
        numbers, values = best.indices.tolist(), best.values.tolist()
        check_scores(values)
        return [Answer(self._answers[number], value) for number, value in zip(numbers, values, strict=True)]


def _answer(names: dict[int, str], number: int) -> str:
    if number not in names:
        raise WeightsError(
            f"weights: config.json: id2label of {len(names)} answers has none of number {number}",
            remedy="Number the answers from 0 on, as the model was trained.",
        )
    return names[number]
