"""What is refused of the folders of BLIP-2, GIT, FLAVA and dual encoders, and in what words; and what may differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dual_encoders import make_dual_encoder
from tests.families import make_align, make_blip2_captioner, make_blip2_matcher, make_flava, make_gemma, make_git
from tests.models import make_clip, random_pixels
from tests.unit.models.test_models_weights import Trap, edit_json
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import identify, load_captioner, load_embedder, load_matcher, pixel_request

MAKERS: dict[str, Callable[[Path], Path]] = {
    "blip2_caption": make_blip2_captioner,
    "blip2_itm": make_blip2_matcher,
    "git": make_git,
    "flava": make_flava,
    "align": make_align,
    "dual_encoder": lambda folder: make_dual_encoder(folder, "siglip"),
}


def load(family: str, folder: Path) -> Any:
    config = ModelConfig(family=family, path=str(folder))
    return (load_captioner if family in ("blip2_caption", "git") else load_matcher)(config, "cpu")


@pytest.mark.parametrize("family", MAKERS)
def test_broken_folders_are_refused_in_our_words(tmp_path: Path, family: str) -> None:
    folder = MAKERS[family](tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if "layer" in name and tensors[name].ndim == 2)

    save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing \(" + name.replace(".", r"\.")):
        load(family, folder)
    save_file({**tensors, "surplus": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 unexpected \(surplus\)"):
        load(family, folder)
    save_file({**tensors, name: torch.zeros(3, 5)}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"is \(3, 5\), not \("):
        load(family, folder)
    weights.write_bytes(weights.read_bytes()[:300])
    with pytest.raises(WeightsError, match="is no whole safetensors file"):
        load(family, folder)
    save_file(tensors, weights, {"format": "pt"})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="cannot be loaded as a tokenizer"):
        load(family, folder)
    weights.unlink()
    torch.save(Trap(tmp_path / "mark"), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is a pickle"):
        load(family, folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "Qwen2Tokenizer"])
def test_a_vision_language_model_without_its_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    folder = make_gemma(tmp_path)
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": kind})  # as most published folders name theirs
    with pytest.raises(WeightsError, match="knows no words"):
        load_captioner(ModelConfig(family="vlm", path=str(folder)), "cpu")


def test_a_configuration_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    folder = make_flava(tmp_path)
    edit_json(folder / "config.json", {"text_config.intermediate_size": "many"})
    with pytest.raises(WeightsError, match="cannot be loaded as FlavaConfig"):
        load("flava", folder)


def test_a_model_of_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="captions videos of 3 frames"):
        load("git", make_git(tmp_path, num_frames=3))


@pytest.mark.parametrize("family", MAKERS)
def test_a_folder_without_its_configuration_is_refused(tmp_path: Path, family: str) -> None:
    """transformers would take the sizes of a published model, and tell of weights that do not fit."""
    folder = MAKERS[family](tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json"):
        load(family, folder)


def test_a_captioner_needs_to_know_how_a_caption_begins(tmp_path: Path) -> None:
    folder = make_blip2_captioner(tmp_path)
    edit_json(folder / "config.json", {"text_config.bos_token_id": None})
    with pytest.raises(WeightsError, match="bos_token_id is missing"):
        load("blip2_caption", folder)
    folder = make_git(tmp_path / "git")
    edit_json(folder / "config.json", {"bos_token_id": None})
    with pytest.raises(WeightsError, match="bos_token_id is missing"):
        load("git", folder)


@pytest.mark.parametrize("lacks", [["lm_head"], ["shared"]])
def test_a_t5_without_one_of_its_two_layers_of_words_is_refused(tmp_path: Path, lacks: list[str]) -> None:
    """Flan-T5's are two; transformers ties them where one is missing, whatever the configuration says."""
    folder = make_blip2_captioner(tmp_path, t5=True)
    load("blip2_caption", folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    names = [f"language_model.{name}.weight" for name in lacks]
    save_file({name: value for name, value in tensors.items() if name not in names}, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"does not fit its architecture: 1 missing \({re.escape(names[0])}\)"):
        load("blip2_caption", folder)
    edit_json(folder / "config.json", {"text_config.tie_word_embeddings": True})
    load("blip2_caption", folder)


@pytest.mark.parametrize("family", ["blip2_itm", "flava", "align", "dual_encoder", "open_clip"])
def test_a_tokenizer_that_cannot_pad_is_refused_when_it_is_loaded(tmp_path: Path, family: str) -> None:
    """It failed at the first texts of different lengths, in the middle of a run."""
    make: Callable[[Path], Path] = make_clip if family == "open_clip" else MAKERS[family]
    folder = make(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = ModelConfig(family=family, path=str(folder))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="has no padding token, so it can make no batch of texts") as refused:
        (load_embedder if family == "open_clip" else load_matcher)(config, "cpu")
    assert "pad_token" in refused.value.remedy


def test_the_first_configurations_of_blip2_name_the_text_input_otherwise(tmp_path: Path) -> None:
    folder, pixels = make_blip2_matcher(tmp_path), random_pixels(2)
    matcher = load("blip2_itm", folder)
    expected = matcher.match_itm(matcher.encode_images(pixels), ["a cat", "a dog"])
    config = json.loads((folder / "config.json").read_text())
    del config["qformer_config"]["use_qformer_text_input"], config["image_token_index"]
    config["qformer_config"]["qformer_text_input"] = True
    (folder / "config.json").write_text(json.dumps(config))
    matcher = load("blip2_itm", folder)
    np.testing.assert_array_equal(matcher.match_itm(matcher.encode_images(pixels), ["a cat", "a dog"]), expected)


def test_heads_of_pretraining_may_be_absent(tmp_path: Path) -> None:
    folder, pixels = make_flava(tmp_path), random_pixels(2)
    matcher = load("flava", folder)
    expected = matcher.match_itm(matcher.encode_images(pixels), ["a cat", "a dog"])
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if name.startswith(("flava.", "itm_head."))}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    matcher = load("flava", folder)
    np.testing.assert_array_equal(matcher.match_itm(matcher.encode_images(pixels), ["a cat", "a dog"]), expected)


def test_half_a_matching_head_is_refused(tmp_path: Path) -> None:
    folder = make_flava(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["itm_head.seq_relationship.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing \(itm_head\.seq_relationship\.weight\)"):
        load("flava", folder)


@pytest.mark.parametrize("change", [{"include_top": True}, {"rescale_offset": False}, {"rescale_factor": 1 / 100}])
def test_align_that_asks_for_another_preprocessing_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = make_align(tmp_path)
    edit_json(folder / "preprocessor_config.json", change)
    with pytest.raises(WeightsError, match="asks for"):
        load_embedder(ModelConfig(family="align", path=str(folder)), "cpu")


@pytest.mark.parametrize("family", ["blip2_caption", "blip2_itm", "git", "flava", "dual_encoder"])
def test_pixels_of_another_size_than_the_model_takes_are_refused(tmp_path: Path, family: str) -> None:
    folder = MAKERS[family](tmp_path)
    side = {"height": 64, "width": 64}
    edit_json(folder / "preprocessor_config.json", {"size": side, "crop_size": side})
    with pytest.raises(WeightsError, match=r"64 pixels, but config\.json says 32"):
        pixel_request("match", ModelConfig(family=family, path=str(folder)), ("squash",))


def test_the_published_preprocessing(tmp_path: Path) -> None:
    """As the files of the published checkpoints have it, where their config.json leaves the size to transformers."""
    align = make_align(tmp_path / "align")
    edit_json(
        align / "preprocessor_config.json",
        {"crop_size": {"height": 289, "width": 289}, "size": {"height": 346, "width": 346}},
    )
    request = pixel_request("embed", ModelConfig(family="align", path=str(align)), ("squash",))
    assert (request.size, request.interpolation) == (289, "bilinear")
    described = identify("embed", ModelConfig(family="align", path=str(align))).preprocessing
    assert described == '[289, "bilinear", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]'
    for family, section in (("git", "vision_config"), ("flava", "image_config"), ("blip2_itm", "vision_config")):
        folder = MAKERS[family](tmp_path / family)
        config = json.loads((folder / "config.json").read_text())
        del config[section]["image_size"]
        (folder / "config.json").write_text(json.dumps(config))
        sizes = {"size": {"shortest_edge": 224} if family == "git" else 224, "crop_size": 224}
        edit_json(folder / "preprocessor_config.json", sizes)
        request = pixel_request("match", ModelConfig(family=family, path=str(folder)), ("squash",))
        assert (request.size, request.interpolation) == (224, "bicubic")
