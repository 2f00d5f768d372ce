"""Any image-text-to-text checkpoint of transformers, asked in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from transformers import GenerationMixin

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.families import FAMILIES
from vlmflow.models import Answer, Usage
from vlmflow.models.attention import growing
from vlmflow.models.generation import STEPS, check_settings
from vlmflow.models.pixels import model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import (
    as_weights_error,
    check_of_model,
    check_padding,
    load_config,
    load_model,
    load_processor,
)
from vlmflow.models.prompted import rows_of
from vlmflow.models.questions import check_scores
from vlmflow.models.thoughts import ThoughtTokens, begins_thought, no_thought
from vlmflow.models.weights import check_keys, families_that_read, read_json

# An image is hundreds of tokens, and each of them is kept while an answer is written.
_SEQUENCES_AT_ONCE = 16
# By the model_type: what transformers writes of an image with these depends on how many stand before it in the batch.
_ALONE = frozenset(("hunyuan_vl",))
# Processors that put the tokens of an image before any text.
_PLACES_IMAGES = frozenset(("Blip2Processor", "Florence2Processor", "InstructBlipProcessor", "Kosmos2Processor"))
# What stands between the image and the text where there is no chat template. PaliGemma's processor puts there the token
# that a text begins with.
_BETWEEN = {
    "ChameleonProcessor": "",
    "LlavaNextProcessor": "\n",
    "LlavaProcessor": "\n",
    "PaliGemmaProcessor": "",
    "PixtralProcessor": "\n",
}
# By the model_type of config.json: models that speak as well, of which the part that writes is loaded.
_SPEAKING = frozenset(("qwen2_5_omni", "qwen3_omni_moe"))


class TransformersChat:
    """Writes for a batch of prompts at a time. N: images, S: side of the pixels.

    Attributes:
        marks: special tokens by which a prompt tells the model of images and turns.
    """

    def __init__(self, model: Any, processor: Any, device: str, dtype: torch.dtype) -> None:
        self._model, self._processor, self._device, self._dtype = model, processor, device, dtype
        writer = _writer(model)
        # What a decoder goes on from ends where it begins to write. An encoder counts its places from the first on.
        processor.tokenizer.padding_side = "right" if writer.config.is_encoder_decoder else "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        ends = writer.generation_config.eos_token_id
        ends = processor.tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        self._thoughts = ThoughtTokens(processor.tokenizer)
        self.marks: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path, device: str, dtype: Dtype = "auto") -> Self:
        """Loads safetensors from a folder.

        Raises:
            WeightsError: the weights do not fit, the processor is absent, either needs code of its own,
                generation_config.json sets what texts end by that are no tokens, and the like, or the model cannot be
                asked about an image.
        """
        kind = model_dtype(device, dtype)
        model, processor = load_image_text_to_text(folder, kind, device)
        if processor.tokenizer.eos_token is None:  # which pads where nothing else does
            check_padding(folder, processor.tokenizer)
        check_settings(folder, _writer(model).generation_config, honoured=STEPS | {"guidance_scale"})
        chat = cls(model.to(device), processor, device, kind)
        with asked(folder) as pixels:
            check_question(folder, processor)
            chat.write(pixels, ["a"], 1)
            chat.marks = _marks(processor)
        return chat

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

        The score is the probability of all tokens written, the end included; where a thought comes first, of those
        behind it. A text that ends within its thought begins as that.

        Raises:
            ValueError: a score is not finite.
        """
        shown = rows_of(pixels, prompts, rows)
        texts = [chat_text(self._processor, prompt) for prompt in prompts]
        answers: dict[int, Answer] = {}
        at_once = 1 if writes_alone(self._model) else max(1, _SEQUENCES_AT_ONCE // num_beams)
        for part in self._batches(texts, at_once):
            with growing(torch.device(self._device)):
                images = as_images(pixels[[shown[number] for number in part]])
                written = self._write(images, [texts[number] for number in part], max_tokens, num_beams)
            answers |= zip(part, written, strict=True)
        return [answers[number] for number in range(len(texts))]

    def take_usage(self) -> Usage | None:
        """Nothing is paid for."""
        return None

    def _batches(self, texts: Sequence[str], at_once: int) -> Iterator[list[int]]:
        """The numbers of the texts that are written together, which have equally many tokens.

        Nothing is padded so: what is written of an image would depend on its neighbours' questions, where a model
        passes over the mask of the padding, as T5 does in counting how far words are from an image before them.
        """
        tokens = self._processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        lengths = [len(text) for text in tokens]
        for _, group in groupby(sorted(range(len(texts)), key=lengths.__getitem__), key=lengths.__getitem__):
            numbers = list(group)
            yield from (numbers[start : start + at_once] for start in range(0, len(numbers), at_once))

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
        begun = torch.tensor([begins_thought(text) for text in texts], device=tokens.device)
        thought, unfinished = self._thoughts.find(tokens.masked_fill(after, pad), begun)
        totals = logarithms.masked_fill(after | thought, 0.0).sum(dim=1)
        tokens = tokens.masked_fill(after | thought | unfinished, pad)
        written = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        written = [
            f"{text}<think>" if is_cut else text
            for text, is_cut in zip(written, unfinished.any(dim=1).tolist(), strict=True)
        ]
        scores = [math.exp(total) for total in totals.tolist()]
        check_scores(scores)
        return [Answer(text.strip(), score) for text, score in zip(written, scores, strict=True)]


def load_image_text_to_text(folder: Path, dtype: torch.dtype, device: str, model_class: Any = None) -> tuple[Any, Any]:
    """Loads a model, ready to be asked, and its processor; from safetensors, and code of transformers alone.

    Args:
        device: that the caller moves the model to.
        model_class: of transformers, one of those that choose by the configuration; None: that for images and texts.

    Raises:
        WeightsError: the weights do not fit, the processor is absent, either needs code of its own, or the model is
            none that is asked in words.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    processor = load_processor(folder)
    _check_asked(folder, processor)
    model_class = model_class or AutoModelForImageTextToText
    kind = read_json(folder / "config.json").get("model_type")
    config = load_config(AutoConfig, folder).thinker_config if kind in _SPEAKING else None
    model, missing, unexpected = load_model(model_class, folder, dtype, device, config)
    check_keys(folder, missing, unexpected)
    if model_class is AutoModelForImageTextToText and not isinstance(model, GenerationMixin):  # DiffusionGemma
        raise WeightsError(
            f"weights: {folder}: models of model_type {kind} do not write token after token",
            remedy="Use another vision-language model: most of them do.",
        )
    check_of_model(folder, processor.tokenizer, model.get_input_embeddings().num_embeddings)
    return model, processor


@contextmanager
def asked(folder: Path) -> Iterator[torch.Tensor]:
    """Within the block a model is asked about an image, as at each image of a run: (1, 3, S, S) uint8, all black.

    Args:
        folder: of the model.

    Raises:
        WeightsError: it fails.
    """
    side = read_preprocessing(folder, ModelConfig(family="vlm", path=str(folder))).size
    what = f"the model of {folder} cannot be asked about an image of {side} pixels a side"
    with as_weights_error(what, "Copy the processor's files and config.json of one model that is asked in words."):
        yield torch.zeros((1, 3, side, side), dtype=torch.uint8)


def chat_text(processor: Any, prompt: str) -> str:
    """The prompt beside an image, in the words of the processor's chat template where it has one; without a thought."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        options = no_thought(processor.chat_template)
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, **options))
    name = type(processor).__name__
    if name in _PLACES_IMAGES:
        return prompt
    return f"{processor.image_token}{_BETWEEN[name]}{prompt}"


def check_question(folder: Path, processor: Any) -> None:
    """Refuses a model that would write about an image without having been asked anything.

    Raises:
        WeightsError: its chat template leaves the question out.
    """
    word = "question"
    if word not in chat_text(processor, word):
        raise WeightsError(
            f"weights: the chat template of {folder} leaves out what the model is asked",
            remedy="Copy chat_template.jinja or chat_template.json from where the model was published.",
        )


def chat_inputs(processor: Any, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """A batch for the model, as the processor makes it: images, tokens and the mask of the padding.

    Args:
        images: at least one.
        texts: of :func:`chat_text`, one for each image.
    """
    begin = processor.tokenizer.bos_token
    # Where the chat template has written the token already, the tokenizer would put another before it.
    options = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    # Each in a list of its own: Gemma 3 takes a flat list for the images of one text.
    nested = [[image] for image in images]
    return processor(images=nested, text=list(texts), padding=True, return_tensors="pt", **options)


def as_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(N, 3, S, S) uint8 RGB -> N images, which all processors take; some take no arrays."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def writes_alone(model: Any) -> bool:
    """Whether a model is to be asked about one image at a time."""
    return model.config.model_type in _ALONE


def _writer(model: Any) -> Any:
    """The model that writes: itself, or, of BLIP-2, InstructBLIP and Kosmos-2, its part, with settings of its own."""
    if type(model).generate is not GenerationMixin.generate:
        for name in ("language_model", "text_model"):
            part = getattr(model, name, None)
            if callable(getattr(part, "generate", None)):
                return part
    return model


def _marks(processor: Any) -> tuple[str, ...]:
    """The special tokens that stand around a prompt, and those that begin and end texts."""
    tokenizer = processor.tokenizer
    around = chat_text(processor, "")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, getattr(processor, "image_token", None)}
    found = {token for token in special if token in around} | {str(token) for token in named if token}
    return tuple(sorted(token for token in found if len(token.strip()) > 2))  # some pad with a mark of punctuation


def _check_asked(folder: Path, processor: Any) -> None:
    """Refuses a model that cannot be told in words what to say of an image.

    Raises:
        WeightsError: its processor takes no texts, or nothing says where among their words the image stands: Qwen2-VL
            for one writes as fluently of an image that it was not told the beginning of.
    """
    name = type(processor).__name__
    is_known = getattr(processor, "chat_template", None) or name in _PLACES_IMAGES or name in _BETWEEN
    if getattr(processor, "tokenizer", None) is not None and is_known:
        return
    found = str(read_json(folder / "config.json").get("model_type"))[:40]
    if able := [family for family in families_that_read(found) if "caption" in FAMILIES[family].roles]:
        remedy = f"Set `family: {able[0]}`, which captions with it."
    elif "chat_template" in signature(type(processor)).parameters:
        remedy = "Copy chat_template.jinja or chat_template.json from where the model was published."
    else:  # transformers drops a template that lies there
        remedy = "Use a model that was tuned to follow instructions."
    raise WeightsError(
        f"weights: {folder}: no chat template says how {found} is asked about an image, nor does {name}", remedy=remedy
    )
