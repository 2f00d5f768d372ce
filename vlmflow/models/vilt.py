"""ViLT question answering (Kim et al. 2021, arXiv:2102.03334): a choice among the answers that it was trained on.

The checkpoint's own processor keeps the aspect ratio and pads; here the whole image is squashed to a square of the
processor's shorter side, as every model of vlmflow is shown it. For a square image that is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, ViltForQuestionAnswering

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import Answer
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.questions import check_paired, tokenize
from vlmflow.models.quiet import no_progress_bar
from vlmflow.models.vilt_fast import ViltTower
from vlmflow.models.weights import check_keys


class ViltAnswerer:
    """One of the model's answers to each question. N: images, M: pairs of image and question, C: answers."""

    def __init__(self, model: Any, tokenizer: Any, normalize: PixelNormalizer, size: int) -> None:
        """``model``: a ``ViltForQuestionAnswering``, whose weights are used; ``size``: side of its pixels.

        Raises:
            WeightsError: pixels of this size do not divide into the model's patches.
        """
        config = model.config
        self._tokenizer, self._tower = tokenizer, ViltTower(model, normalize, size)
        self._answers = [config.id2label[number] for number in range(config.num_labels)]
        self._is_multi_label = config.problem_type == "multi_label_classification"

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> Self:
        """Loads ``ViltForQuestionAnswering`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        kind = model_dtype(device, dtype)
        try:
            with no_progress_bar():
                model, found = ViltForQuestionAnswering.from_pretrained(
                    folder, dtype=kind, use_safetensors=True, local_files_only=True, output_loading_info=True
                )
            # trust_remote_code must be given: left out, transformers asks on the terminal.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes that differ
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(
                f"weights: {folder} cannot be loaded as ViltForQuestionAnswering: {reason}",
                remedy="Copy the model's whole folder: configuration, safetensors and tokenizer that belong together.",
            ) from error
        check_keys(folder, found["missing_keys"], found["unexpected_keys"])
        preprocessing = read_preprocessing(folder, config)
        model = model.to(device).eval().requires_grad_(False)
        return cls(model, tokenizer, PixelNormalizer(preprocessing, device, kind), preprocessing.size)

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
        return [
            Answer(self._answers[number], score)
            for number, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
