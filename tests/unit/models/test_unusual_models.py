"""Checkpoints of unusual configuration: what transformers or open_clip makes of them, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import load_checkpoint
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipForQuestionAnswering,
    ViltConfig,
    ViltForQuestionAnswering,
)

from tests.families import build_model, make_align, make_blip2_captioner, make_flava, make_git
from tests.models import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGE_SIZE,
    as_images,
    make_blip_vqa,
    make_captioner,
    make_clip,
    make_judge,
    make_vilt,
    random_pixels,
)
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import load_answerer, load_captioner, load_embedder, pixel_request

# As the first configurations that transformers saved had them all: they ask for nothing.
AT_REST = {"repetition_penalty": 1.0, "length_penalty": 1.0, "num_beams": 4, "do_sample": True, "temperature": 0.5}
AT_REST |= {"min_length": 0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "early_stopping": False, "max_length": 5}
AT_REST |= {"num_beam_groups": 1, "num_return_sequences": 1, "output_scores": True, "return_dict_in_generate": True}
AT_REST |= {"chat_format": "none that transformers knows"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unusual")
    makers = {
        "blip_caption": make_captioner,
        "blip_vqa": make_blip_vqa,
        "blip2_caption": make_blip2_captioner,
        "git": make_git,
        "vilt": make_vilt,
        "vlm": make_judge,
    }
    return {family: make(root / family) for family, make in makers.items()}


def load(family: str, folder: Path) -> Any:
    config = ModelConfig(family=family, path=str(folder))
    return (load_answerer if family in ("blip_vqa", "vilt") else load_captioner)(config, "cpu")


@pytest.mark.parametrize(
    ("family", "file", "change", "named"),
    [
        ("blip_caption", "config", {"text_config.guidance_scale": 2.0}, "guidance_scale 2.0"),
        ("blip_vqa", "config", {"text_config.min_new_tokens": 4}, "min_new_tokens 4"),
        ("blip2_caption", "config", {"text_config.stop_strings": ["red"]}, "stop_strings"),
        ("git", "generation_config", {"repetition_penalty": 5.0, "num_beams": 3}, r"\(repetition_penalty 5.0\)"),
        ("git", "generation_config", {"length_penalty": 0.0}, "length_penalty 0.0"),
        ("vlm", "generation_config", {"stop_strings": ["red"], "repetition_penalty": 1.1}, r"\(stop_strings"),
    ],
)
def test_settings_of_decoding_that_are_not_heeded_are_refused(
    tmp_path: Path, made: dict[str, Path], family: str, file: str, change: dict[str, Any], named: str
) -> None:
    """transformers' captions of these weights are others: they must not be passed over."""
    folder = copytree(made[family], tmp_path / family)
    edit_json(folder / f"{file}.json", change)
    with pytest.raises(WeightsError, match=f"sets how texts are decoded .*{named}") as refused:
        load(family, folder)
    assert "Remove " in refused.value.remedy


@pytest.mark.parametrize("family", ["blip_caption", "blip2_caption", "git"])
def test_settings_at_rest_and_those_of_a_job_change_nothing(tmp_path: Path, made: dict[str, Path], family: str) -> None:
    folder, pixels = copytree(made[family], tmp_path / family), random_pixels(3)
    if family == "git":
        edit_json(folder / "generation_config.json", AT_REST)
    else:
        edit_json(folder / "config.json", {f"text_config.{name}": value for name, value in AT_REST.items()})
    assert load(family, folder).caption(pixels, 8) == load(family, made[family]).caption(pixels, 8)


def test_git_whose_two_files_end_captions_otherwise_is_refused(tmp_path: Path, made: dict[str, Path]) -> None:
    folder = copytree(made["git"], tmp_path / "git")
    edit_json(folder / "generation_config.json", {"eos_token_id": 11})
    with pytest.raises(WeightsError, match=r"eos_token_id is 11 in generation_config\.json, and 3 in config\.json"):
        load("git", folder)


def test_blip2_heeds_what_transformers_does(tmp_path: Path, made: dict[str, Path]) -> None:
    folder, pixels = copytree(made["blip2_caption"], tmp_path / "blip2"), random_pixels(5)
    edit_json(folder / "config.json", {"text_config.min_new_tokens": 6, "text_config.sequence_bias": [[[9], 3.0]]})
    shown = AutoImageProcessor.from_pretrained(folder)(as_images(pixels), return_tensors="pt")["pixel_values"]
    reference = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    tokens = reference.generate(pixel_values=shown, max_new_tokens=8, num_beams=3)
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    captions = load("blip2_caption", folder).caption(pixels, 8, 3)
    assert captions == [text.strip() for text in texts]
    assert captions != load("blip2_caption", made["blip2_caption"]).caption(pixels, 8, 3)


@pytest.mark.parametrize(
    ("family", "model_class", "section", "width", "message"),
    [
        ("blip_vqa", BlipForQuestionAnswering, "vision_config", "hidden_size", "one width, not hidden_size 64 of"),
        (
            "blip2_caption",
            Blip2ForConditionalGeneration,
            "text_config",
            "word_embed_proj_dim",
            "language model have 64",
        ),
    ],
)
def test_parts_of_different_widths_are_refused_when_they_are_loaded(
    tmp_path: Path, made: dict[str, Path], family: str, model_class: Any, section: str, width: str, message: str
) -> None:
    """transformers builds them, and fails at every image, or takes a part of each vector."""
    folder = copytree(made[family], tmp_path / family)
    config = model_class.config_class.from_pretrained(folder)
    setattr(getattr(config, section), width, 64)
    build_model(model_class, model_class.config_class(**config.to_dict())).save_pretrained(folder)
    with pytest.raises(WeightsError, match=message):
        load(family, folder)


def test_vilt_is_shown_the_side_that_its_divisor_leaves(tmp_path: Path, made: dict[str, Path]) -> None:
    folder = copytree(made["vilt"], tmp_path / "vilt")
    edit_json(folder / "preprocessor_config.json", {"size": {"shortest_edge": 30}, "size_divisor": 8})
    assert pixel_request("answer", ModelConfig(family="vilt", path=str(folder)), ("squash",)).size == 24
    pixels, question = random_pixels(3, size=24), "what is on the table"
    # Of this side, what its processor is told of sides changes nothing more.
    shown = AutoImageProcessor.from_pretrained(folder)(as_images(pixels), do_resize=False, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)([question] * 3, return_tensors="pt")
    with torch.inference_mode():
        logits = ViltForQuestionAnswering.from_pretrained(folder).eval()(**tokens, **shown).logits
    scores = [answers[0].score for answers in load("vilt", folder).answer(pixels, [[question]] * 3)]
    np.testing.assert_allclose(scores, logits.softmax(dim=-1).amax(dim=-1), atol=1e-5)
    edit_json(folder / "preprocessor_config.json", {"size_divisor": 32})
    with pytest.raises(WeightsError, match="size_divisor 32 leaves nothing of an image of 30 pixels"):
        load("vilt", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"1": "red", "2": "blue"}}, "id2label of 2 answers has none of number 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_vilt_without_answers_or_layers_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = make_vilt(tmp_path)
    config = ViltConfig(**json.loads((folder / "config.json").read_text()) | change)
    ViltForQuestionAnswering(config).save_pretrained(folder)
    edit_json(folder / "config.json", change)
    with pytest.raises(WeightsError, match=message):
        load("vilt", folder)


def test_an_image_tower_without_layers_is_that_of_open_clip(tmp_path: Path) -> None:
    folder, pixels = make_clip(tmp_path, vision={"layers": 0}), random_pixels(3)
    embedder = load_embedder(ModelConfig(family="open_clip", path=str(folder)), "cpu")
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    load_checkpoint(model, str(folder / "open_clip_model.safetensors"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.inference_mode():
        expected = model.encode_image((pixels / 255 - mean) / std, normalize=True)
    np.testing.assert_allclose(embedder.embed_images(pixels), expected, atol=1e-5)


@pytest.mark.parametrize("vision", [{"pool_type": "none"}, {"output_tokens": True}, {"attentional_pool": "parallel"}])
def test_an_open_clip_that_cannot_embed_is_refused_when_it_is_loaded(tmp_path: Path, vision: dict[str, Any]) -> None:
    """open_clip builds it, and each image of a run would have failed."""
    folder = make_clip(tmp_path, vision=vision)
    with pytest.raises(WeightsError, match="cannot embed an image of 32 pixels a side and a word"):
        load_embedder(ModelConfig(family="open_clip", path=str(folder)), "cpu")


def test_a_model_that_gives_no_numbers_in_float16_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """Each image of a run would have failed, and each decision been `review`."""
    config = ModelConfig(family="align", path=str(make_align(tmp_path)))
    assert np.isfinite(load_embedder(config, "cpu", "bfloat16").embed_images(random_pixels(2))).all()
    with pytest.raises(WeightsError, match="not finite for a black image or a word, in float16") as refused:
        load_embedder(config, "cpu", "float16")
    assert "`dtype: float32`" in refused.value.remedy


def test_a_blip_2_that_cannot_caption_is_refused_when_it_is_loaded(tmp_path: Path, made: dict[str, Path]) -> None:
    """transformers keeps what a T5 has written for as many layers as its encoder has."""
    folder = make_blip2_captioner(tmp_path, t5=True)
    config = Blip2Config.from_pretrained(folder)
    config.text_config.num_decoder_layers = 3
    Blip2ForConditionalGeneration(Blip2Config(**config.to_dict())).save_pretrained(folder)
    with pytest.raises(WeightsError, match="cannot caption an image of 32 pixels a side: IndexError"):
        load_captioner(ModelConfig(family="blip2_caption", path=str(folder)), "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_mask": "shuffle"}, "by reduction_mask 'shuffle'"),
        ({"of_none": 1}, "open_clip's own tokenizer"),
    ],
)
def test_an_open_clip_whose_texts_have_no_one_vector_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Each time that open_clip tokenizes a long text so, other words of it are dropped."""
    folder = make_clip(tmp_path)
    words = {"model_cfg.text_cfg.hf_tokenizer_name": None, "model_cfg.text_cfg.tokenizer_kwargs": options}
    edit_json(folder / "open_clip_config.json", words)
    with pytest.raises(WeightsError, match=message) as refused:
        load_embedder(ModelConfig(family="open_clip", path=str(folder)), "cpu")
    assert "tokenizer_kwargs in open_clip_config.json" in refused.value.remedy


def test_an_image_size_of_two_equal_sides_is_one_of_squares(tmp_path: Path) -> None:
    folder, pixels = make_flava(tmp_path), random_pixels(2)
    config = ModelConfig(family="flava", path=str(folder))
    expected = load_embedder(config, "cpu").embed_images(pixels)
    edit_json(folder / "config.json", {"image_config.image_size": [IMAGE_SIZE, IMAGE_SIZE]})
    np.testing.assert_array_equal(load_embedder(config, "cpu").embed_images(pixels), expected)
