"""ViLT question answering (Kim et al. 2021, arXiv:2102.03334): a choice among the answers that it was trained on.

The checkpoint's own processor keeps the aspect ratio and pads; here the whole image is squashed to a square of the
processor's shorter side, as every model of vlmflow is shown it. For a square image that is the same. Where transformers
shuffles the patches of each image in a loop, they stay in order here: attention does not mind.
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
from vlmflow.models.weights import check_keys

# Pairs of an image and a question that go through the model together.
_PAIRS_AT_ONCE = 256


class ViltAnswerer:
    """One of the model's answers to each question. N: images, M: pairs of image and question, P: patches."""

    def __init__(self, model: Any, tokenizer: Any, normalize: PixelNormalizer, size: int) -> None:
        """``model``: a ``ViltForQuestionAnswering``; ``size``: side of its pixels."""
        self._model, self._tokenizer, self._normalize = model, tokenizer, normalize
        config = model.config
        self._answers = [config.id2label[number] for number in range(config.num_labels)]
        self._is_multi_label = config.problem_type == "multi_label_classification"
        self._max_tokens: int = config.max_position_embeddings
        self._embed = model.vilt.embeddings
        self._positions = _positions(self._embed.position_embeddings, config, size)

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto") -> Self:
        """Loads ``ViltForQuestionAnswering`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        kind = model_dtype(device, dtype)
        try:
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
        tokenize(self._tokenizer, questions, self._max_tokens)

    @torch.inference_mode()
    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`.

        Scores are softmaxed over all answers, or a sigmoid each where the configuration says that several can hold.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        ids = tokenize(self._tokenizer, [question for asked in questions for question in asked], self._max_tokens)
        if not rows:
            return [[] for _ in questions]
        patches = self._patches(pixels)
        found = [
            answer
            for start in range(0, len(rows), _PAIRS_AT_ONCE)
            for answer in self._choose(
                patches[rows[start : start + _PAIRS_AT_ONCE]], ids[start : start + _PAIRS_AT_ONCE]
            )
        ]
        given = iter(found)
        return [[next(given) for _ in asked] for asked in questions]

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 -> (N, 1 + P, D): class token and patches, with their positions."""
        inputs = self._normalize(pixels)
        patches = self._embed.patch_embeddings(inputs).flatten(2).transpose(1, 2)
        begin = self._embed.cls_token.expand(len(patches), -1, -1)
        embedded: torch.Tensor = torch.cat([begin, patches], dim=1) + self._positions
        return embedded

    def _choose(self, patches: torch.Tensor, ids: list[list[int]]) -> list[Answer]:
        """(M, 1 + P, D) and M questions -> M answers."""
        text = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(patches.device)
        logits = self._model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            image_embeds=patches,
            pixel_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).logits.float()
        scores = logits.sigmoid() if self._is_multi_label else logits.softmax(dim=-1)
        best = scores.max(dim=-1)
        return [
            Answer(self._answers[number], score)
            for number, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _positions(embeddings: torch.Tensor, config: Any, size: int) -> torch.Tensor:
    """(1, 1 + P, D): the positions of the patches of a square of ``size``, interpolated as transformers does."""
    side, wanted = config.image_size // config.patch_size, size // config.patch_size
    if wanted * config.patch_size != size:
        raise WeightsError(
            f"weights: pixels of side {size} do not divide into patches of {config.patch_size}",
            remedy="Use the preprocessor_config.json that belongs to these weights.",
        )
    begin, grid = embeddings[:, :1], embeddings[:, 1:]
    grid = grid.transpose(1, 2).reshape(1, -1, side, side)
    grid = torch.nn.functional.interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=True)
    return torch.cat([begin, grid.flatten(2).transpose(1, 2)], dim=1).detach()
