"""Any image-text-to-text checkpoint of transformers, asked in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.config import Dtype
from vlmflow.models import Answer, Usage
from vlmflow.models.attention import growing
from vlmflow.models.generation import STEPS, check_settings
from vlmflow.models.pixels import model_dtype
from vlmflow.models.pretrained import check_of_model, check_padding, load_model, load_processor
from vlmflow.models.prompted import rows_of
from vlmflow.models.questions import check_scores
from vlmflow.models.weights import check_keys

# An image is hundreds of tokens, and each of them is kept while an answer is written.
_SEQUENCES_AT_ONCE = 16
# Processors that put the tokens of an image before any text.
_PLACES_IMAGES = frozenset(("Florence2Processor", "Blip2Processor", "InstructBlipProcessor"))


class TransformersChat:
    """Writes for a batch of prompts at a time. N: images, S: side of the pixels."""

    def __init__(self, model: Any, processor: Any, device: str, dtype: torch.dtype) -> None:
        self._model, self._processor, self._device, self._dtype = model, processor, device, dtype
        # Sequences end together, so what is written begins at one place for all of them.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        ends = processor.tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])

    @classmethod
    def load(cls, folder: Path, device: str, dtype: Dtype = "auto") -> Self:
        """Loads safetensors from a folder.

        Raises:
            WeightsError: the weights do not fit, the processor is absent, either needs code of its own, or
                generation_config.json sets what texts end by that are no tokens, and the like.
        """
        kind = model_dtype(device, dtype)
        model, processor = load_image_text_to_text(folder, kind, device)
        if processor.tokenizer.eos_token is None:  # which pads where nothing else does
            check_padding(folder, processor.tokenizer)
        check_settings(folder, model.generation_config, honoured=STEPS | {"guidance_scale"})
        return cls(model.to(device), processor, device, kind)

    @torch.inference_mode()
    def write(
        self,
        pixels: torch.Tensor,
        prompts: Sequence[str],
        max_tokens: int,
        num_beams: int = 1,
        *,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Writes what each prompt asks for of its image; see :class:`vlmflow.models.prompted.VisionChat`.

        The score is the probability of all tokens written, the end included.

        Raises:
            ValueError: a score is not finite.
        """
        shown = rows_of(pixels, prompts, rows)
        texts = [chat_text(self._processor, prompt) for prompt in prompts]
        answers: list[Answer] = []
        at_once = max(1, _SEQUENCES_AT_ONCE // num_beams)
        for start in range(0, len(texts), at_once):
            part = slice(start, start + at_once)
            images = list(pixels[shown[part]].permute(0, 2, 3, 1).contiguous().cpu().numpy())
            with growing(torch.device(self._device)):
                answers += self._write(images, texts[part], max_tokens, num_beams)
        return answers

    def take_usage(self) -> Usage | None:
        """Nothing is paid for."""
        return None

    def _write(self, images: list[Any], texts: list[str], max_tokens: int, num_beams: int) -> list[Answer]:
        inputs = chat_inputs(self._processor, images, texts).to(self._device, self._dtype)
        pad = self._processor.tokenizer.pad_token_id
        out = self._model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=num_beams,
            # Of the checkpoint's own defaults those that only sampling heeds.
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self._ends or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        # Before it stands the prompt or, where an encoder reads that, the token that the decoder begins with.
        num_written = out.beam_indices.shape[1] if num_beams > 1 else len(out.logits)
        tokens = out.sequences[:, -num_written:]
        logits = torch.stack(out.logits, dim=1).float()
        if num_beams > 1:  # of all beams: at each step those of the beam that the text went on from
            logits = logits[out.beam_indices.clamp(min=0), torch.arange(num_written, device=tokens.device)]
        logarithms = logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        ended = torch.isin(tokens, torch.tensor(self._ends, device=tokens.device))
        after = ended.cumsum(dim=1) - ended.long() > 0
        totals = logarithms.masked_fill(after, 0.0).sum(dim=1)
        written = self._processor.tokenizer.batch_decode(tokens.masked_fill(after, pad), skip_special_tokens=True)
        scores = [math.exp(total) for total in totals.tolist()]
        check_scores(scores)
        return [Answer(text.strip(), score) for text, score in zip(written, scores, strict=True)]


def load_image_text_to_text(folder: Path, dtype: torch.dtype, device: str, model_class: Any = None) -> tuple[Any, Any]:
    """Loads a model, ready to be asked, and its processor; from safetensors, and code of transformers alone.

    Args:
        device: that the caller moves the model to.
        model_class: of transformers, one of those that choose by the configuration; None: that for images and texts.

    Raises:
        WeightsError: the weights do not fit, the processor is absent, or either needs code of its own.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(folder)
    model, missing, unexpected = load_model(model_class or AutoModelForImageTextToText, folder, dtype, device)
    check_keys(folder, missing, unexpected)
    check_of_model(folder, processor.tokenizer, model.get_input_embeddings().num_embeddings)
    return model, processor


def chat_text(processor: Any, prompt: str) -> str:
    """The prompt beside an image, in the words of the processor's chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True))
    if type(processor).__name__ in _PLACES_IMAGES:
        return prompt
    token = getattr(processor, "image_token", "<image>")
    return f"{token}\n{prompt}"


def chat_inputs(processor: Any, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> Any:
    """A batch for the model, as the processor makes it: images, tokens and the mask of the padding.

    Args:
        images: at least one; (S, S, 3) uint8 RGB each.
        texts: of :func:`chat_text`, one for each image.
    """
    begin = processor.tokenizer.bos_token
    # Where the chat template has written the token already, the tokenizer would put another before it.
    options = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    return processor(
        # Each in a list of its own: Gemma 3 takes a flat list for the images of one text.
        images=[[image] for image in images],
        text=list(texts),
        padding=True,
        return_tensors="pt",
        input_data_format="channels_last",
        **options,
    )
