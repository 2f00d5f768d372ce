"""Models whose encoder reads the prompt write what their decoder does, and what writes nothing has not answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
    T5Config,
)

from tests.models import IMAGE_SIZE, WORDS, random_pixels
from vlmflow.models.vlm import TransformersChat

SIDE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPT = "a picture of the red"


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "<s>", "<image>", *WORDS]
    words_at = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    words_at.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words_at, extra_special_tokens=named, **special)
    fast.add_tokens(["<image>"], special_tokens=True)
    return fast


def save(model: Any, processor: Any, folder: Path) -> Path:
    with torch.no_grad():  # as built, all pictures are worded alike
        for weights in model.parameters():
            weights.mul_(3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_queries(config_class: Any, words: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    text = T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    return config_class(
        vision_config={**TINY, "image_size": IMAGE_SIZE, "patch_size": 8},
        qformer_config={**TINY, "encoder_hidden_size": 32, "vocab_size": len(words)},
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )


def blip2(folder: Path) -> Path:
    words = tokenizer()
    config = with_queries(Blip2Config, words)
    processor = Blip2Processor(BlipImageProcessor(size=SIDE), words, num_query_tokens=4)
    return save(Blip2ForConditionalGeneration(config), processor, folder)


def instructblip(folder: Path) -> Path:
    words = tokenizer()
    config = with_queries(InstructBlipConfig, words)
    processor = InstructBlipProcessor(BlipImageProcessor(size=SIDE), words, tokenizer(), num_query_tokens=4)
    return save(InstructBlipForConditionalGeneration(config), processor, folder)


def florence2(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer(image_token="<image>")
    ends = {"bos_token_id": 3, "pad_token_id": 0, "eos_token_id": 1}
    layers = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    layers |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    text = BartConfig(vocab_size=len(words), d_model=32, decoder_start_token_id=1, **layers, **ends)
    twice = {"patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True)}
    twice |= {"embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2), "depths": (1, 1)}
    vision = Florence2VisionConfig(window_size=2, projection_dim=32, **twice)
    image_token = words.convert_tokens_to_ids("<image>")
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image_token, **ends
    )
    images = CLIPImageProcessor(size=SIDE, do_center_crop=False)
    images.image_seq_length = 17  # 4 x 4 places and their mean
    return save(Florence2ForConditionalGeneration(config), Florence2Processor(images, words), folder)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("make", [blip2, instructblip, florence2])
def test_what_the_decoder_writes_is_the_text(make: Callable[[Path], Path], num_beams: int, tmp_path: Path) -> None:
    folder, pixels = make(tmp_path), random_pixels(3)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
    inputs = processor(images=pictures, text=[PROMPT] * 3, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    with torch.inference_mode():
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    beams = out.beam_indices if num_beams > 1 else None
    scores = model.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)

    written = TransformersChat.load(folder, "cpu").write(pixels, [PROMPT] * 3, 6, num_beams)

    assert [answer.text for answer in written] == processor.batch_decode(out.sequences, skip_special_tokens=True)
    assert all(0 < answer.score < 1 for answer in written)
    totals = scores.masked_fill(out.sequences[:, 1:] == 0, 0).sum(dim=1).exp()
    np.testing.assert_allclose([answer.score for answer in written], totals.numpy(), rtol=1e-3)


@pytest.mark.parametrize("make", [blip2, instructblip, florence2])
def test_a_text_is_the_one_that_it_is_alone(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Padding before an encoder's words moves them, or moves them away from the image."""
    chat, pixels = TransformersChat.load(make(tmp_path), "cpu"), random_pixels(4)
    prompts = ["red", "a picture of the red car and two dogs", "a car", "car"]
    alone = [chat.write(pixels[row : row + 1], [prompt], 6)[0] for row, prompt in enumerate(prompts)]
    together = chat.write(pixels, prompts, 6)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    np.testing.assert_allclose([a.score for a in together], [a.score for a in alone], rtol=1e-4)
