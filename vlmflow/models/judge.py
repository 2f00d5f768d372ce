"""A vision-language model as a judge: asked a question about an image, how likely is its answer `Yes`.

As ShieldGemma 2 is used (Zeng et al. 2025, arXiv:2504.01081): the probability is that of `Yes` against `No` as the
first token of the answer; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.errors import WeightsError
from vlmflow.models.pixels import model_dtype
from vlmflow.models.vlm import chat_inputs, chat_text, load_image_text_to_text

_ANSWERS = ("Yes", "No")
_INSTRUCTION = "Answer with one word, Yes or No."


class VlmJudge:
    """Any image-text-to-text checkpoint of transformers. N: images, S: side of the pixels, Q: questions."""

    def __init__(self, model: Any, processor: Any, questions: Sequence[str], device: str) -> None:
        self._model, self._processor, self._device = model, processor, device
        self._prompts = [self._prompt(question) for question in questions]
        self._answers = [self._token(answer) for answer in _ANSWERS]

    @classmethod
    def load(cls, folder: Path, questions: Sequence[str], device: str) -> Self:
        """Loads safetensors from a folder: bfloat16 on CUDA, float32 elsewhere.

        Raises:
            WeightsError: the weights do not fit, the processor is absent, or either needs code of its own.
        """
        model, processor = load_image_text_to_text(folder, model_dtype(device))
        return cls(model.to(device), processor, questions, device)

    @torch.inference_mode()
    def score(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, Q) probability of `Yes` against `No`, in float32."""
        images = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
        columns = [self._ask(images, prompt) for prompt in self._prompts] if images else []
        return np.stack(columns, axis=1) if columns else np.empty((0, len(self._prompts)), np.float32)

    def _ask(self, images: list[NDArray[np.uint8]], prompt: str) -> NDArray[np.float32]:
        inputs = chat_inputs(self._processor, images, [prompt] * len(images))
        inputs = inputs.to(self._device, model_dtype(self._device))
        # All prompts are equal, so there is no padding, and the last position is each prompt's own.
        logits = self._model(**inputs, logits_to_keep=1).logits[:, -1, self._answers].float()
        return cast("NDArray[np.float32]", logits.softmax(dim=-1)[:, 0].cpu().numpy())

    def _prompt(self, question: str) -> str:
        return chat_text(self._processor, f"{question} {_INSTRUCTION}")

    def _token(self, answer: str) -> int:
        tokens = self._processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise WeightsError(f"weights: the tokenizer has no token for {answer!r}", remedy="Use another judge.")
        return int(tokens[0])
