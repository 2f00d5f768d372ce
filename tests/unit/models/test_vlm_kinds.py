"""Vision-language models that are told in other ways where the image is: written as their documentation has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonProcessor,
    CLIPImageProcessor,
    GPT2Config,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLImageProcessor,
    HunYuanVLProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

from tests.families import build_model, make_blip2_captioner, make_git
from tests.models import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    WORDS,
    as_images,
    make_captioner,
    make_judge,
    random_pixels,
    write_json,
)
from tests.unit.models.test_models_weights import edit_json
from vlmflow.errors import WeightsError
from vlmflow.models.judge import VlmJudge
from vlmflow.models.pretrained import load_tokenizer
from vlmflow.models.vlm import TransformersChat

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PROMPTS = ["red", "a picture of the red car", ""]


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "Yes", "No", *WORDS]
    of_words = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    of_words.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=of_words, extra_special_tokens=named, **names)
    fast.add_tokens([AddedToken("\n", normalized=False), *special, *named.values()], special_tokens=True)
    return fast


def saved(model_class: Any, config: Any, processor: Any, folder: Path) -> Path:
    build_model(model_class, config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pali_gemma(folder: Path) -> Path:
    images = SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer())
    text = SIZES | TOKENS | {"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1}
    config = PaliGemmaConfig(
        vision_config=SIZES | {"model_type": "siglip_vision_model", "image_size": IMAGE_SIZE, "patch_size": 8},
        text_config=text | {"vocab_size": len(processor.tokenizer)},
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    return saved(PaliGemmaForConditionalGeneration, config, processor, folder)


def kosmos2(folder: Path) -> Path:
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIDE)
    processor = Kosmos2Processor(images, tokenizer(), num_patch_index_tokens=4)
    text = {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2, "max_position_embeddings": 120}
    config = Kosmos2Config(
        text_config=text | TOKENS | {"vocab_size": len(processor.tokenizer) + 64},
        vision_config=SIZES | {"image_size": IMAGE_SIZE, "patch_size": 8},
        latent_query_num=64,
    )
    return saved(Kosmos2ForConditionalGeneration, config, processor, folder)


def idefics2(folder: Path) -> Path:
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 24, "longest_edge": 48}, do_image_splitting=False)
    processor = Idefics2Processor(images, words, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    sampler = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    config = Idefics2Config(
        vision_config=SIZES | {"image_size": 48, "patch_size": 8},
        perceiver_config=sampler | {"resampler_head_dim": 16, "num_key_value_heads": 1},
        text_config=SIZES | TOKENS | {"num_key_value_heads": 2, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return saved(Idefics2ForConditionalGeneration, config, processor, folder)


def chameleon(folder: Path) -> Path:
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    words = tokenizer("<sep>", *(f"IMGIMG{letter}Z" for letter in "ABCDEFGH"), **names)
    words.sep_token = "<sep>"
    images = ChameleonImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIDE)
    quantizer = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": IMAGE_SIZE}
    config = ChameleonConfig(
        **SIZES,
        **TOKENS,
        num_key_value_heads=2,
        vocab_size=len(words),
        vocabulary_map=words.get_vocab(),
        vq_config=quantizer | {"base_channels": 32, "channel_multiplier": (1, 1, 1), "num_res_blocks": 1},
    )
    model = build_model(ChameleonForConditionalGeneration, config)
    with torch.no_grad():
        for layer in model.model.layers:  # as built, all that counts is the mark that every prompt ends with
            layer.self_attn.o_proj.weight.mul_(8)
    model.save_pretrained(folder)
    ChameleonProcessor(images, words, image_seq_length=64).save_pretrained(folder)
    return folder


def hunyuan(folder: Path) -> Path:
    names = {"image_token": "<image>", "image_start_token": "<begin>", "image_end_token": "<end>"}
    words = tokenizer(**names)
    images = HunYuanVLImageProcessor(size={"shortest_edge": 1024, "longest_edge": 4096}, patch_size=8)
    template = CHAT_TEMPLATE.replace("<image>", "<begin><image><end>")
    processor = HunYuanVLProcessor(images, words, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
    text = SIZES | TOKENS | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words), "eod_token_id": 2}
    vision = SIZES | {"num_key_value_heads": 2, "patch_size": 8, "out_hidden_size": 32, "text_hidden_size": 32}
    config = HunYuanVLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        **{f"{name}_id": words.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return saved(HunYuanVLForConditionalGeneration, config, processor, folder)


def documented(folder: Path, pixels: torch.Tensor, prompts: list[str], max_tokens: int) -> tuple[list[str], list[Any]]:
    """What transformers writes of each image alone, asked as its documentation says; and the logits of the first."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    texts, first = [], []
    for image, prompt in zip(as_images(pixels), prompts, strict=True):
        if processor.chat_template:
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            mark = "<image>" if isinstance(processor, ChameleonProcessor) else ""
            inputs = processor(images=image, text=f"{mark}{prompt}", return_tensors="pt")
        options = {"max_new_tokens": max_tokens, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**inputs, **options, do_sample=False)
        texts.append(processor.decode(out.sequences[0, -len(out.logits) :], skip_special_tokens=True).strip())
        first.append(out.logits[0][0])
    return texts, first


@pytest.mark.parametrize("make", [pali_gemma, kosmos2, idefics2, chameleon])
def test_an_image_is_told_of_as_the_documentation_does(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, pixels = make(tmp_path), random_pixels(3, size=24 if make is idefics2 else IMAGE_SIZE)
    expected, _ = documented(folder, pixels, PROMPTS, 5)
    written = TransformersChat.load(folder, "cpu").write(pixels, PROMPTS, 5)
    assert [answer.text for answer in written] == expected
    assert len(set(expected)) > 1, "the texts must differ"

    asked = "the car Answer with one word, Yes or No."
    _, logits = documented(folder, pixels, [asked] * 3, 1)
    scores = VlmJudge.load(folder, ["the car"], "cpu").score(pixels)
    np.testing.assert_allclose(scores[:, 0], torch.stack(logits)[:, [4, 5]].softmax(dim=1)[:, 0], atol=1e-5)


def test_a_model_whose_batches_depend_on_their_order_is_asked_about_one_image_at_a_time(tmp_path: Path) -> None:
    """transformers numbers HunYuanVL's images through the batch, and turns the vectors of each by its number."""
    folder, pixels = hunyuan(tmp_path), random_pixels(3)
    chat, judge = TransformersChat.load(folder, "cpu"), VlmJudge.load(folder, ["the car"], "cpu")
    alone = [chat.write(pixels[row : row + 1], ["the car"], 5)[0] for row in range(3)]
    np.testing.assert_allclose([a.score for a in chat.write(pixels, ["the car"] * 3, 5)], [a.score for a in alone])
    expected = np.concatenate([judge.score(pixels[row : row + 1]) for row in range(3)])
    np.testing.assert_array_equal(judge.score(pixels), expected)
    assert judge.score(pixels[:0]).shape == (0, 1)


def test_blip_2_ends_where_its_language_model_does(tmp_path: Path) -> None:
    """Its own `generate` hands over to that, with that one's settings, whatever generation_config.json says."""
    folder, pixels = make_blip2_captioner(tmp_path), random_pixels(4)
    words = AutoTokenizer.from_pretrained(folder)
    Blip2Processor(BlipImageProcessor(size=SIDE), words, num_query_tokens=4).save_pretrained(folder)
    chat = TransformersChat.load(folder, "cpu")
    longest = max((answer.text for answer in chat.write(pixels, ["a red"] * 4, 8)), key=len).split()
    end = words.convert_tokens_to_ids(longest[3])
    edit_json(folder / "config.json", {"text_config.eos_token_id": end})
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=as_images(pixels), text=["a red"] * 4, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    expected = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    written = [answer.text for answer in TransformersChat.load(folder, "cpu").write(pixels, ["a red"] * 4, 8)]
    assert written == expected
    assert [text.split()[-1] == longest[3] for text in expected].count(True) > 0


@pytest.mark.parametrize(("family", "make"), [("blip_caption", make_captioner), ("git", make_git)])
def test_a_model_that_is_not_asked_in_words_is_refused(
    tmp_path: Path, family: str, make: Callable[[Path], Path]
) -> None:
    """transformers would go on from the prompt, as from the first words of a caption."""
    with pytest.raises(WeightsError, match=r"says how \w+ is asked about an image, nor does (Blip|Git)") as refused:
        TransformersChat.load(make(tmp_path), "cpu")
    assert f"`family: {family}`" in refused.value.remedy


def test_a_folder_with_a_tokenizer_for_a_processor_is_refused(tmp_path: Path) -> None:
    """As those of captioners that an image encoder and a language model were put together for."""
    VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="how vision-encoder-decoder is asked about an image") as refused:
        TransformersChat.load(tmp_path, "cpu")
    assert "follow instructions" in refused.value.remedy


@pytest.mark.parametrize("load", [TransformersChat.load, lambda folder, device: VlmJudge.load(folder, ["a"], device)])
def test_a_model_that_fails_at_images_is_refused_when_it_is_loaded(load: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_judge(tmp_path)
    edit_json(folder / "processor_config.json", {"patch_size": 16})
    with pytest.raises(WeightsError, match="cannot be asked about an image of 32 pixels a side: ValueError: Image"):
        load(folder, "cpu")
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('no images') }}", encoding="utf-8")
    with pytest.raises(WeightsError, match="a side: TemplateError: no images"):
        TransformersChat.load(folder, "cpu")


def test_a_model_whose_chat_template_was_left_behind_is_refused(tmp_path: Path) -> None:
    """Without the marks of the beginning and the end of an image it would be told of it otherwise, in silence."""
    folder = idefics2(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="how idefics2 is asked about an image, nor does Idefics2P") as no:
        TransformersChat.load(folder, "cpu")
    assert "Copy chat_template.jinja" in no.value.remedy


@pytest.mark.parametrize("needed_by", [AutoProcessor, AutoModelForImageTextToText])
def test_a_package_that_a_model_needs_is_named(needed_by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_a_package(*_: Any, **__: Any) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    folder = make_judge(tmp_path)
    monkeypatch.setattr(needed_by, "from_pretrained", needs_a_package)
    with pytest.raises(WeightsError, match="needs a package that is not installed: Package `num2words`") as refused:
        TransformersChat.load(folder, "cpu")
    assert "Install it on every node" in refused.value.remedy


def test_a_tokenizer_that_drops_every_word_is_refused(tmp_path: Path) -> None:
    """transformers reads it with the class that it has for the kind of the model, whatever made it."""
    tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path, 99)("a red car")["input_ids"]) == 3
    write_json(tmp_path / "config.json", {"model_type": "qwen3_5"})
    with pytest.raises(WeightsError, match="read as Qwen3_5Tokenizer, makes no tokens of words"):
        load_tokenizer(tmp_path, 99)
