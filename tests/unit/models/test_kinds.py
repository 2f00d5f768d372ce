"""Kinds of models that transformers has not, or for other tasks; quantized weights; code of a folder's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.families import build_model
from tests.models import CHAT_TEMPLATE, as_images, make_captioner, make_judge, random_pixels
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import load_answerer
from vlmflow.models.classifier import ImageClassifier
from vlmflow.models.judge import VlmJudge
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.vlm import TransformersChat
from vlmflow.models.weights import locate

Change = Callable[[Path], None]
CODE = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoProcessor": "code.Processor"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copytree(made, tmp_path / "model")


def planned_and_loaded(folder: Path) -> TransformersChat:
    return TransformersChat.load(locate(ModelConfig(family="vlm", path=str(folder))), "cpu")


def config(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", changes)


def to_whole_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told", "remedy"),
    [
        (to_whole_numbers, r"is quantized: \d+ weights are whole numbers", "float32"),
        (config(quantization_config={"quant_method": "modelopt"}), "does not know the method modelopt", "family: vllm"),
        (config(quantization_config={"bits": 4}), "does not know the method None", "family: vllm"),
        (config(**{"text_config.quantization_config": {"quant_method": "own"}}), "know the method own", "endpoint"),
        (
            config(model_type="moondream1"),
            r"transformers [\d.]+ has no model of model_type moondream1",
            "another model",
        ),
        (config(model_type="moondream1", auto_map=CODE), r"asks for code of its own \(auto_map\)", "has itself"),
    ],
)
def test_what_transformers_would_pass_over_or_run_is_refused(
    folder: Path, change: Change, told: str, remedy: str
) -> None:
    """Of whole numbers, and of methods that it does not know, it makes a model that writes something else."""
    change(folder)
    with pytest.raises(WeightsError, match=told) as refused:
        planned_and_loaded(folder)
    assert str(folder) in str(refused.value)
    assert remedy in refused.value.remedy


def test_code_of_a_folder_is_not_needed_for_what_transformers_has(folder: Path, made: Path) -> None:
    config(auto_map=CODE)(folder)
    pixels = random_pixels(2)
    expected = TransformersChat.load(made, "cpu").write(pixels, ["the car"] * 2, 4)
    assert planned_and_loaded(folder).write(pixels, ["the car"] * 2, 4) == expected


def test_a_model_that_does_not_write_token_after_token_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DiffusionGemma, which fills in a text as a whole, by chance, and tells the probability of no token."""
    monkeypatch.setattr("vlmflow.models.vlm.GenerationMixin", type("NoneHas", (), {}))
    with pytest.raises(WeightsError, match="models of model_type llava do not write token after token"):
        TransformersChat.load(made, "cpu")


def test_a_kind_that_is_no_classifier_is_refused_as_a_detector(folder: Path) -> None:
    settings = ModelConfig(family="image_classification", path=str(folder))
    with pytest.raises(WeightsError, match=r"has no AutoModelForImageClassification of model_type llava"):
        ImageClassifier.load(folder, settings, [], "cpu")


@pytest.mark.parametrize(
    ("family", "found", "remedy"),
    [
        ("git", "blip", "Set `family: blip_caption`"),
        ("blip_vqa", "vilt", "Set `family: vilt`"),
        ("blip2_itm", "blip", "Set `family: blip_itm`"),
        ("blip2_caption", "instructblip", "The family reads blip-2."),
    ],
)
def test_a_model_of_another_family_is_told_of_when_it_is_planned(
    tmp_path: Path, family: str, found: str, remedy: str
) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{found}"}}', encoding="utf-8")
    with pytest.raises(WeightsError, match=f"model_type {found} is not of the family {family}") as refused:
        read_preprocessing(tmp_path, ModelConfig(family=family, path=str(tmp_path)))
    assert remedy in refused.value.remedy


def test_weights_for_another_task_say_what_they_are_for(tmp_path: Path) -> None:
    settings = ModelConfig(family="blip_vqa", path=str(make_captioner(tmp_path)))
    with pytest.raises(WeightsError, match=r"does not fit its architecture: \d+ missing") as refused:
        load_answerer(settings, "cpu")
    assert "they are of BlipForConditionalGeneration" in refused.value.remedy


@pytest.mark.parametrize("load", [TransformersChat.load, lambda folder, device: VlmJudge.load(folder, ["a"], device)])
@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("<image>", "leaves out what the model is asked"),
        ("{{ raise_exception('no system') }}", "TemplateError: no system"),
        ("{% if", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_asks_nothing_or_fails_is_refused(
    folder: Path, load: Callable[..., Any], template: str, told: str
) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(WeightsError, match=told) as refused:
        load(folder, "cpu")
    assert str(folder) in str(refused.value)


def omni(folder: Path) -> Path:
    """Writes a Qwen2.5-Omni as it is published: what thinks, beside what speaks."""
    names = {f"{name}_token": f"<|{name}|>" for name in ("image", "audio", "video")}
    names |= {f"{name}_{end}_token": f"<|{name}_{end}|>" for name in ("vision", "audio") for end in ("bos", "eos")}
    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=names)
    words.add_tokens(list(names.values()), special_tokens=True)
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 32}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    thinker = Qwen2_5OmniThinkerConfig(
        audio_config=audio | {"num_mel_bins": 16, "max_source_positions": 32, "n_window": 8},
        vision_config=vision | {"window_size": 32, "fullatt_block_indexes": [0], "out_hidden_size": 32},
        text_config=text | {"num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": rope},
        **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image", "audio", "video")},
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_bos|>"),
        pad_token_id=0,
    )
    build_model(Qwen2_5OmniThinkerForConditionalGeneration, thinker).save_pretrained(folder)
    path = folder / "model.safetensors"
    found = {f"thinker.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(found | {"talker.a": torch.ones(2), "token2wav.b": torch.ones(2)}, path, {"format": "pt"})
    Qwen2_5OmniConfig(thinker_config=thinker.to_dict()).save_pretrained(folder)
    Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 1024, "longest_edge": 4096}),
        Qwen2VLVideoProcessor(patch_size=8),
        WhisperFeatureExtractor(feature_size=16),
        words,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<|vision_bos|><|image|><|vision_eos|>"),
    ).save_pretrained(folder)
    return folder


def test_of_a_model_that_speaks_the_part_that_writes_is_loaded(tmp_path: Path) -> None:
    """As transformers documents it, which leaves the pickle with the voices alone."""
    folder, pixels, prompts = omni(tmp_path), random_pixels(2), ["red", "blue"]
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for image, prompt in zip(as_images(pixels), prompts, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
    assert [answer.text for answer in planned_and_loaded(folder).write(pixels, prompts, 6)] == expected
    assert len(set(expected)) == 2
