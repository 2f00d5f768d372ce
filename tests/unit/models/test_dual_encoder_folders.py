"""Which folders are read as dual encoders, which are refused, and in what words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from tests.dual_encoders import KINDS, make_dual_encoder
from tests.families import make_align
from tests.models import IMAGE_SIZE, make_clip, random_pixels
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import identify, load_embedder, pixel_request
from vlmflow.models.preprocessing import read_preprocessing

TEXTS = ["a red car", "two dogs"]
Change = Callable[[Path], object]


def config_of(folder: Path, family: str = "dual_encoder") -> ModelConfig:
    return ModelConfig(family=family, path=str(folder))


def embedded(folder: Path) -> np.ndarray[Any, Any]:
    return load_embedder(config_of(folder), "cpu").embed_texts(TEXTS)


def edit(change: dict[str, Any], name: str = "config.json") -> Change:
    return lambda folder: edit_json(folder / name, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return apply


def without(part: str) -> Change:
    return tensors(lambda found: {name: value for name, value in found.items() if part not in name})


def without_pooling(folder: Path) -> None:
    edit({"vision_config.vision_use_head": False})(folder)
    without("vision_model.head")(folder)


def words_in_two_files(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()


def with_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('it was run')")
    for name, kinds in (("config.json", ("AutoModel", "AutoConfig")), ("tokenizer_config.json", ("AutoTokenizer",))):
        edit_json(folder / name, {"auto_map": dict.fromkeys(kinds, "evil.Evil")})


def in_shards(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


_POSITIONS = {
    "text_model.embeddings.position_ids": torch.arange(16)[None],
    "vision_model.embeddings.position_ids": torch.arange(17)[None],
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("clip", tensors(lambda found: found | _POSITIONS)),  # as transformers 4 saved them
        ("clip", tensors(lambda found: {f"clip.{name}": value for name, value in found.items()})),
        ("altclip", tensors(lambda found: {name.replace("layers.", "layer."): value for name, value in found.items()})),
        ("clip", in_shards),
        ("clip", words_in_two_files),
        ("clip", edit({"return_dict": False})),
        ("clip", with_code),
        ("siglip2", edit({"model_max_length": 1e30}, "tokenizer_config.json")),
        ("siglip", edit({"image_processor_type": "SiglipImageProcessorFast"}, "preprocessor_config.json")),
    ],
)
def test_other_forms_of_a_folder_are_read(
    dual_encoders: dict[str, Path], tmp_path: Path, kind: str, change: Change
) -> None:
    folder = shutil.copytree(dual_encoders[kind], tmp_path / kind)
    change(folder)
    np.testing.assert_allclose(embedded(folder), embedded(dual_encoders[kind]), atol=1e-6)


def test_an_encoder_of_no_layers_is_what_its_files_say(dual_encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(dual_encoders["clip"], tmp_path / "clip")
    edit_json(folder / "config.json", {"vision_config.num_hidden_layers": 0})
    without("vision_model.encoder")(folder)
    assert load_embedder(config_of(folder), "cpu").embed_images(random_pixels(2)).shape == (2, 24)


def test_weights_in_half_precision_are_computed_with_in_the_wanted_one(
    dual_encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(dual_encoders["clip"], tmp_path / "clip")
    tensors(lambda found: {name: value.half() for name, value in found.items()})(folder)
    edit_json(folder / "config.json", {"dtype": "float16"})
    embedder = load_embedder(config_of(folder), "cpu")
    assert {weights.dtype for weights in embedder._model.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), embedded(dual_encoders["clip"]), atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "clip",
            edit({"text_config.eos_token_id": 5}),
            "ends texts with token 623, but its model reads them at token 5",
        ),
        ("clip", edit({"text_config.eos_token_id": [623]}), r"reads them at token \[623\]"),
        ("metaclip_2", edit({"model_type": "clip"}), "reads them at the one of the highest number"),
        (
            "clip",
            edit({"model_max_length": 2}, "tokenizer_config.json"),
            r"reads texts of 2 tokens \(model_max_length\)",
        ),
        ("clip", edit({"model_max_length": "x"}, "tokenizer_config.json"), "reads texts of x tokens"),
        ("altclip", edit({"text_config.pad_token_id": None}), "cannot embed an image of 32 pixels a side and a word"),
        ("siglip", without_pooling, "cannot embed an image of 32 pixels a side and a word"),
        ("clip", edit({"vision_config": None}), r"shows its model 32 pixels, but config\.json says 224"),
        ("clip", edit({"vision_config": [1]}), "vision_config is no JSON object"),
        ("clip", edit({"text_config": "x"}), "cannot be loaded as AutoModel"),
        ("clip", edit({"projection_dim": 12}), r"text_projection\.weight is \(24, 32\), not \(12, 32\)"),
        ("siglip", edit({"model_type": "clip"}), "does not fit its architecture"),
        ("clip", edit({"vision_config.image_size": 64}), r"shows its model 32 pixels, but config\.json says 64"),
        (
            "clip",
            edit({"vision_config_dict": {"image_size": 64}}),
            r"shows its model 32 pixels, but config\.json says 64",
        ),
        ("clip", without("text_"), "holds no encoder of texts"),
        ("siglip", without("vision_"), "holds no encoder of images"),
        (
            "siglip2_naflex",
            edit({"patch_size": 16}, "preprocessor_config.json"),
            r"at most 20 patches of 16 pixels a side, but config\.json says 8",
        ),
        ("siglip2_naflex", edit({"max_num_patches": "x"}, "preprocessor_config.json"), "at most 'x' patches"),
        (
            "tipsv2",
            edit({"size": 40}, "preprocessor_config.json"),
            r"model 40 pixels, but config\.json says 32",
        ),
        ("clip", without("logit_scale"), r"1 missing \(logit_scale\)"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    dual_encoders: dict[str, Path], tmp_path: Path, kind: str, change: Change, message: str
) -> None:
    folder = shutil.copytree(dual_encoders[kind], tmp_path / kind)
    change(folder)
    with pytest.raises(WeightsError, match=message) as refused:
        embedded(folder)
    assert str(folder) in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(("kind", "other"), [("siglip", "clip"), ("chinese_clip", "clip"), ("clip", "siglip")])
def test_the_tokenizer_of_another_model_is_refused(
    dual_encoders: dict[str, Path], tmp_path: Path, kind: str, other: str
) -> None:
    folder = shutil.copytree(dual_encoders[kind], tmp_path / kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dual_encoders[other] / name, folder)
    with pytest.raises(WeightsError, match=r"are none of its model's|ends texts with token") as refused:
        embedded(folder)
    assert "one model" in refused.value.remedy


def test_words_that_the_model_has_no_row_for_are_unknown_to_it(tmp_path: Path) -> None:
    """SigLIP's multilingual tokenizer has 100 more than its model, which torch would read beyond its rows for."""
    folder = make_dual_encoder(tmp_path / "siglip2", "siglip2", num_stray=1)
    embedder = load_embedder(config_of(folder), "cpu")
    stray, unknown, known = embedder.embed_texts(["a red <extra_0>", "a red <unk>", "a red"])
    np.testing.assert_allclose(stray, unknown, atol=1e-6)
    assert np.abs(stray - known).max() > 0.01


@pytest.mark.parametrize(
    ("model_type", "remedy"),
    [
        ("clip_vision_model", "the encoder of images alone"),
        ("chinese_clip_text_model", "the encoder of texts alone"),
        ("align", "Set `family: align`"),
        ("flava", "Set `family: flava`"),
        ("clipseg", "The family reads altclip, chinese_clip, clip, metaclip_2, siglip, siglip2, tipsv2."),
        (None, "The family reads altclip"),
        (["clip"], "The family reads altclip"),
    ],
)
def test_other_kinds_of_models_are_refused_before_anything_is_loaded(
    dual_encoders: dict[str, Path], tmp_path: Path, model_type: object, remedy: str
) -> None:
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(dual_encoders["clip"] / name, tmp_path)
    edit_json(tmp_path / "config.json", {"model_type": model_type})
    with pytest.raises(WeightsError, match="is not of the family dual_encoder") as refused:
        pixel_request("embed", config_of(tmp_path), ("squash",))
    assert remedy in refused.value.remedy


def test_a_dual_encoder_is_not_read_as_align(dual_encoders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="model_type clip is not of the family align") as refused:
        load_embedder(config_of(dual_encoders["clip"], "align"), "cpu")
    assert "Set `family: dual_encoder`" in refused.value.remedy
    assert load_embedder(config_of(make_align(tmp_path), "align"), "cpu").dim == 24


@pytest.mark.parametrize("has_config", [False, True])
def test_open_clip_says_which_family_reads_the_folder(
    dual_encoders: dict[str, Path], tmp_path: Path, has_config: bool
) -> None:
    """A repository of the hub often has open_clip's configuration beside weights of transformers."""
    folder = shutil.copytree(dual_encoders["clip"], tmp_path / "clip")
    if has_config:
        shutil.copy(make_clip(tmp_path / "open_clip") / "open_clip_config.json", folder)
    with pytest.raises(WeightsError, match="as transformers saves it") as refused:
        pixel_request("embed", config_of(folder, "open_clip"), ("squash",))
    assert refused.value.remedy.startswith("Set `family: dual_encoder`, which reads it.")


def test_a_tokenizer_that_needs_a_package_names_it(
    dual_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(dual_encoders["siglip"], tmp_path / "siglip")

    def absent(*_: object, **__: object) -> None:
        raise ImportError("BertJapaneseTokenizer requires fugashi")

    monkeypatch.setattr("vlmflow.models.pretrained.AutoTokenizer.from_pretrained", absent)
    with pytest.raises(WeightsError, match="a package that is not installed: BertJapaneseTokenizer") as refused:
        embedded(folder)
    assert "every node" in refused.value.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_that_the_processor_is_for(dual_encoders: dict[str, Path], kind: str) -> None:
    """Squashed to the side of the crop, where one is cut out of the middle."""
    described = read_preprocessing(dual_encoders[kind], config_of(dual_encoders[kind]))
    assert (described.size, described.interpolation) == (IMAGE_SIZE, "bicubic")
    assert (described.mean == (0.5, 0.5, 0.5)) == kind.startswith("siglip")


def test_the_first_clips_tell_their_sizes_twice(dual_encoders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers, by the section whose name ends with _dict."""
    folder = shutil.copytree(dual_encoders["clip"], tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config |= {f"{name}_dict": config[name] for name in ("text_config", "vision_config")}
    config["vision_config"] = config["text_config"] = None
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(embedded(folder), embedded(dual_encoders["clip"]))


def test_both_roles_have_one_identity(dual_encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(dual_encoders["altclip"], tmp_path / "altclip")
    first = identify("embed", config_of(folder))
    assert identify("match", config_of(folder)) == first
    (folder / "sentencepiece.bpe.model").write_bytes(b"words")  # which a tokenizer may be read from
    assert identify("embed", config_of(folder)).weights_digest != first.weights_digest
