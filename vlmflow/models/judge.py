"""A vision-language model as a judge: asked a question about an image, how likely is its answer `Yes`.

As ShieldGemma 2 is used (Zeng et al. 2025, arXiv:2504.01081): the probability is that of `Yes` against `No` as the
first token of the answer; nothing is generated. ShieldGemma 2 itself is asked as it was trained: its chat template asks
whether the image violates a policy, and a question is the text of that policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmflow.errors import WeightsError
from vlmflow.models.attention import growing
from vlmflow.models.pixels import model_dtype
from vlmflow.models.thoughts import begins_thought
from vlmflow.models.vlm import (
    as_images,
    asked,
    chat_inputs,
    chat_text,
    check_question,
    load_image_text_to_text,
    writes_alone,
)
from vlmflow.models.weights import read_json

_ANSWERS = ("Yes", "No")
_INSTRUCTION = "Answer with one word, Yes or No."


class VlmJudge:
    """Any image-text-to-text checkpoint of transformers. N: images, S: side of the pixels, Q: questions."""

    def __init__(self, model: Any, processor: Any, questions: Sequence[str], device: str) -> None:
        """``questions``: as the model is to read them, within its chat template."""
        self._model, self._processor, self._device = model, processor, device
        self._prompts = [chat_text(processor, question) for question in questions]
        self._answers = _answer_tokens(processor.tokenizer)

    @classmethod
    def load(cls, folder: Path, questions: Sequence[str], device: str) -> Self:
        """Loads safetensors from a folder: bfloat16 on a GPU that has it, float32 elsewhere.

        Raises:
            WeightsError: the weights do not fit, the processor is absent, either needs code of its own, the tokenizer
                does not tell the answers apart, or the model cannot be asked about an image.
        """
        if read_json(folder / "config.json").get("model_type") == "shieldgemma2":
            model, processor = _load_shield_gemma(folder, model_dtype(device), device)
        else:
            model, processor = load_image_text_to_text(folder, model_dtype(device), device)
            questions = [f"{question} {_INSTRUCTION}" for question in questions]
        with asked(folder) as pixels:
            check_question(folder, processor)
            judge = cls(model.to(device), processor, questions, device)
            if any(begins_thought(prompt) for prompt in judge._prompts):
                raise WeightsError(
                    f"weights: the chat template of {folder} has the model think first, and it answers later",
                    remedy="Use the model of its maker that answers at once, often called Instruct.",
                )
            judge.score(pixels)
        return judge

    @torch.inference_mode()
    def score(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, Q) probability of `Yes` against `No`, in float32."""
        images = as_images(pixels)
        parts = [[image] for image in images] if writes_alone(self._model) else [images] * bool(images)
        with growing(torch.device(self._device)):
            rows = [np.stack([self._ask(part, prompt) for prompt in self._prompts], axis=1) for part in parts]
        return np.concatenate(rows) if rows else np.empty((0, len(self._prompts)), np.float32)

    def _ask(self, images: list[Image.Image], prompt: str) -> NDArray[np.float32]:
        # All prompts are equal, so there is no padding.
        inputs = chat_inputs(self._processor, images, [prompt] * len(images))
        out = self._model.generate(
            **inputs.to(self._device, model_dtype(self._device)),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = out.logits[0][:, self._answers].float()
        return cast("NDArray[np.float32]", logits.softmax(dim=-1)[:, 0].cpu().numpy())


def _answer_tokens(tokenizer: Any) -> list[int]:
    """The first token of each answer."""
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][:1] for answer in _ANSWERS]
    yes, no = tokens
    # Were they one token, or both unknown, every image would score 0.5.
    if not yes or not no or yes == no or tokenizer.unk_token_id in (*yes, *no):
        raise WeightsError(
            f"weights: the tokenizer of {tokenizer.name_or_path} has no tokens that tell Yes from No",
            remedy="Use a judge whose tokenizer knows the words Yes and No, capitals included.",
        )
    return [*yes, *no]


def _load_shield_gemma(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The Gemma 3 within ShieldGemma 2, whose own class gives two numbers, and Gemma 3's processor.

    ShieldGemma 2's own processor takes no text: it asks about the policies of its configuration.
    """
    from transformers import AutoModelForImageClassification, Gemma3Processor

    model, processor = load_image_text_to_text(folder, dtype, device, AutoModelForImageClassification)
    return model.model, Gemma3Processor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        image_seq_length=processor.image_seq_length,
    )
