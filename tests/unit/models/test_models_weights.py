"""Which weights are refused, and in what words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, CLIPConfig, CLIPModel

from tests.models import (
    make_blip_vqa,
    make_captioner,
    make_classifier,
    make_clip,
    make_judge,
    make_matcher,
    make_vilt,
    random_pixels,
)
from tests.vilbert import make_vilbert
from vlmflow.config import ModelConfig
from vlmflow.errors import ModelMemoryError, WeightsError
from vlmflow.models import clip as clip_module
from vlmflow.models import (
    identify,
    load_answerer,
    load_captioner,
    load_embedder,
    load_matcher,
    pixel_request,
)
from vlmflow.models.classifier import ImageClassifier
from vlmflow.models.judge import VlmJudge
from vlmflow.models.weights import find_weights, locate, weights_digest

# The families of tests/families.py have tests of their own.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "open_clip": make_clip,
    "blip_caption": make_captioner,
    "blip_itm": make_matcher,
    "blip_vqa": make_blip_vqa,
    "vilt": make_vilt,
    "vilbert": lambda folder: make_vilbert(folder, {"kind": "columns", "max_regions": 4}),
    "vlm": make_judge,
    "vlm_judge": make_judge,
    "image_classification": make_classifier,
}
BAD_SETTINGS = {"hidden_size": "many", "hidden_act": "none"}


def load(family: str, folder: Path) -> None:
    config = ModelConfig(family=family, path=str(folder))
    if family == "vlm_judge":
        VlmJudge.load(folder, ["Does the picture show a gun?"], "cpu")
    elif family == "image_classification":
        ImageClassifier.load(folder, config, ["hentai"], "cpu")
    elif family == "open_clip":
        load_embedder(config, "cpu")
    elif family == "blip_itm":
        load_matcher(config, "cpu")
    else:
        (load_captioner if family in ("blip_caption", "vlm") else load_answerer)(config, "cpu")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip")


def clip_config(folder: Path) -> ModelConfig:
    return ModelConfig(family="open_clip", path=str(folder))


def edit_json(path: Path, change: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        target = content
        for step in section.split(".") if section else []:
            target = target[step]
        target[name] = value
    path.write_text(json.dumps(content))


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


def test_an_absent_folder_is_named_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"no folder {tmp_path}/none") as caught:
        locate(ModelConfig(family="blip_itm", path=str(tmp_path / "none"), repo="Salesforce/blip-itm-base-coco"))
    assert "Salesforce/blip-itm-base-coco" in caught.value.remedy


def test_a_pickle_is_named_and_never_loaded(clip: Path, tmp_path: Path) -> None:
    (clip / "open_clip_model.safetensors").unlink()
    torch.save(Trap(tmp_path / "mark"), clip / "open_clip_pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"open_clip_pytorch_model\.bin is a pickle") as caught:
        load_embedder(clip_config(clip), "cpu")
    assert "convert" in caught.value.remedy
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_left_alone(clip: Path, tmp_path: Path) -> None:
    # open_clip itself would prefer the pickle to a file of this name.
    (clip / "open_clip_model.safetensors").rename(clip / "model.safetensors")
    torch.save(Trap(tmp_path / "mark"), clip / "open_clip_pytorch_model.bin")
    load_embedder(clip_config(clip), "cpu")
    assert not (tmp_path / "mark").exists()


def test_missing_and_unexpected_tensors_are_named(clip: Path) -> None:
    path = clip / "open_clip_model.safetensors"
    tensors = load_file(path)
    tensors["surplus.weight"] = tensors.pop("ln_final.weight")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"missing \(ln_final\.weight\).*unexpected \(surplus\.weight\)"):
        load_embedder(clip_config(clip), "cpu")


def test_missing_tensors_of_blip_are_named(tmp_path: Path) -> None:
    folder = make_captioner(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.post_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing \(vision_model\.post_layernorm\.weight\)"):
        load_captioner(ModelConfig(family="blip_caption", path=str(folder)), "cpu")


@pytest.mark.parametrize("family", ["open_clip", "blip_caption"])
def test_tensors_of_another_shape_are_refused(tmp_path: Path, family: str) -> None:
    if family == "open_clip":
        folder = make_clip(tmp_path)
        edit_json(folder / "open_clip_config.json", {"model_cfg.embed_dim": 12})
        load: Any = load_embedder
    else:
        folder = make_captioner(tmp_path)
        edit_json(folder / "config.json", {"text_config.intermediate_size": 128})
        load = load_captioner
    with pytest.raises(WeightsError, match=r"cannot be loaded|does not fit"):
        load(ModelConfig(family=family, path=str(folder)), "cpu")


@pytest.mark.parametrize("family", MAKERS)
def test_a_truncated_file_is_refused(tmp_path: Path, family: str) -> None:
    folder = MAKERS[family](tmp_path)
    (path,) = find_weights(folder, family)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=f"weights: {folder}.*deserializing header") as caught:
        load(family, folder)
    assert caught.value.remedy


@pytest.mark.parametrize("family", ["blip_vqa", "vilt", "vlm", "vlm_judge", "image_classification"])
def test_mistakes_in_files_beside_the_weights_are_told_in_our_words(tmp_path: Path, family: str) -> None:
    folder = MAKERS[family](tmp_path)
    load(family, folder)
    inner = "text_config." if family in ("blip_vqa", "vlm", "vlm_judge") else ""
    mistakes: list[tuple[str, dict[str, Any] | None]] = [("tokenizer_config.json", None), ("config.json", None)]
    mistakes += [("config.json", {f"{inner}{name}": value}) for name, value in BAD_SETTINGS.items()]
    for name, change in mistakes:
        path = folder / name
        if not path.is_file():
            continue
        text = path.read_text()
        if change is None:
            path.write_text("[]")
        else:
            edit_json(path, change)
        with pytest.raises(WeightsError, match=f"weights: {folder}"):
            load(family, folder)
        path.write_text(text)


def test_a_tokenizer_of_an_unknown_kind_is_told_in_our_words(tmp_path: Path) -> None:
    folder = make_vilt(tmp_path)
    edit_json(folder / "tokenizer.json", {"model": {"type": "none"}})
    with pytest.raises(WeightsError, match="cannot be loaded as a tokenizer"):  # tokenizers raises Exception itself
        load("vilt", folder)


@pytest.mark.parametrize("family", ["blip_caption", "blip_itm", "blip_vqa", "vilt", "vilbert"])
def test_a_folder_without_its_vocabulary_is_refused(tmp_path: Path, family: str) -> None:
    """transformers makes a tokenizer of it all the same, to which every word is unknown."""
    folder = MAKERS[family](tmp_path)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    if family != "vilbert":  # which has one kind alone
        edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(WeightsError, match="knows no words: its vocabulary is absent or empty") as caught:
        load(family, folder)
    assert "vocab.txt" in caught.value.remedy


@pytest.mark.parametrize("family", ["blip_caption", "blip_vqa"])
@pytest.mark.parametrize(
    ("name", "token"), [("bos_token_id", None), ("pad_token_id", None), ("sep_token_id", -1), ("bos_token_id", 30522)]
)
def test_tokens_that_the_model_does_not_have_are_refused(
    tmp_path: Path, family: str, name: str, token: int | None
) -> None:
    folder = MAKERS[family](tmp_path)
    edit_json(folder / "config.json", {f"text_config.{name}": token})
    with pytest.raises(WeightsError, match=f"text_config.{name} is {token}, which is none of the model's"):
        load(family, folder)


def test_open_clip_weights_of_no_tensor_are_refused(clip: Path) -> None:
    save_file({}, clip / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match="it holds no tensors"):
        load_embedder(clip_config(clip), "cpu")


def test_an_open_clip_folder_without_its_vocabulary_is_refused(clip: Path) -> None:
    (clip / "tokenizer.json").unlink()
    for kind, mark in (("BertTokenizer", "vocab.txt"), ("T5Tokenizer", "spiece.model")):
        edit_json(clip / "tokenizer_config.json", {"tokenizer_class": kind})
        with pytest.raises(WeightsError, match="knows no words") as caught:
            load_embedder(clip_config(clip), "cpu")
        assert mark in caught.value.remedy


def test_the_folder_cannot_switch_remote_code_on(clip: Path, tmp_path: Path) -> None:
    (clip / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass Evil: pass\n")
    edit_json(
        clip / "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
    )
    edit_json(clip / "open_clip_config.json", {"model_cfg.text_cfg.tokenizer_kwargs": {"trust_remote_code": True}})
    with pytest.raises(WeightsError, match="tokenizer"):
        load_embedder(clip_config(clip), "cpu")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [{"model_cfg.text_cfg.hf_model_name": "roberta-base"}, {"model_cfg.vision_cfg.timm_model_name": "hf-hub:some/vit"}],
)
def test_towers_that_open_clip_would_download_are_refused(clip: Path, change: dict[str, str]) -> None:
    edit_json(clip / "open_clip_config.json", change)
    with pytest.raises(WeightsError, match="no fixed revision"):
        load_embedder(clip_config(clip), "cpu")


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_hub_repository_needs_a_commit_hash(revision: str | None) -> None:
    with pytest.raises(WeightsError, match="is no commit hash"):
        locate(ModelConfig(family="open_clip", repo="laion/some", revision=revision))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_cfg", {"context_length": [3]}, "open_clip cannot build the model that .* describes: TypeError"),
        ("vision_cfg", {"timm_pool": "middle"}, "open_clip cannot build the model that .* describes: AssertionError"),
        ("vision_cfg", {"timm_model_name": "vit_of_nobody"}, "describes: RuntimeError: Unknown model"),
        (None, {"init_logit_bias": None}, "does not fit its architecture"),
        (None, {"text_cfg": "x"}, "has no whole model_cfg"),
    ],
)
def test_a_configuration_that_open_clip_cannot_build_is_told(
    tmp_path: Path, part: str | None, change: dict[str, Any], message: str
) -> None:
    path = make_clip(tmp_path, siglip=True) / "open_clip_config.json"
    content = json.loads(path.read_text())
    (content["model_cfg"] if part is None else content["model_cfg"][part]).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        load_embedder(clip_config(tmp_path), "cpu")


@pytest.mark.parametrize("architecture", [None, "ViT-B-32-quickgelu"])
def test_a_clip_of_transformers_is_told_from_one_of_open_clip(tmp_path: Path, architecture: str | None) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes)).save_pretrained(tmp_path)
    config = ModelConfig(family="open_clip", path=str(tmp_path), architecture=architecture)
    with pytest.raises(WeightsError, match="as transformers saves it, which open_clip does not read") as caught:
        pixel_request("embed", config, ("squash",))
    assert "timm/vit_base_patch32_clip_224.openai" in caught.value.remedy


def test_an_architecture_stands_in_for_the_configuration_file(clip: Path) -> None:
    (clip / "open_clip_config.json").unlink()
    with pytest.raises(WeightsError, match="no open_clip_config") as caught:
        pixel_request("embed", clip_config(clip), ("squash",))
    assert "architecture" in caught.value.remedy
    config = ModelConfig(family="open_clip", path=str(clip), architecture="ViT-B-16-SigLIP")
    assert pixel_request("embed", config, ("squash",)).size == 224
    assert "0.5, 0.5, 0.5" in identify("embed", config).preprocessing
    with pytest.raises(WeightsError, match="architecture ViT-Z: open_clip knows none"):
        identify("embed", config.model_copy(update={"architecture": "ViT-Z"}))


def test_an_architecture_is_part_of_the_identity_where_it_counts(clip: Path) -> None:
    names = ("ViT-B-32", "ViT-B-32-quickgelu")  # the same tensors under another activation
    configs = [ModelConfig(family="open_clip", path=str(clip), architecture=name) for name in names]
    assert identify("embed", configs[0]) == identify("embed", configs[1]), "the folder has a configuration of its own"
    (clip / "open_clip_config.json").unlink()
    plain, quick = (identify("embed", config) for config in configs)
    assert plain.preprocessing == quick.preprocessing
    assert plain.weights_digest != quick.weights_digest


def test_the_digest_follows_what_loading_reads(clip: Path) -> None:
    digest = weights_digest(clip, "open_clip")
    (clip / "README.md").write_text("a model card")
    assert weights_digest(clip, "open_clip") == digest
    (clip / "tokenizer_config.json").write_text((clip / "tokenizer_config.json").read_text() + " ")
    assert weights_digest(clip, "open_clip") != digest


def test_blip_that_asks_for_another_preprocessing_is_refused(tmp_path: Path) -> None:
    folder = make_captioner(tmp_path)
    edit_json(folder / "preprocessor_config.json", {"resample": 1})
    with pytest.raises(WeightsError, match="asks for preprocessing other than"):
        pixel_request("caption", ModelConfig(family="blip_caption", path=str(folder)), ("squash",))
    edit_json(folder / "preprocessor_config.json", {"resample": 2, "rescale_factor": "1/255"})
    with pytest.raises(WeightsError, match="rescale_factor '1/255' is no number"):
        pixel_request("caption", ModelConfig(family="blip_caption", path=str(folder)), ("squash",))
    edit_json(folder / "preprocessor_config.json", {"rescale_factor": 1 / 255, "size": {"height": 64, "width": 64}})
    with pytest.raises(WeightsError, match=r"size 64, but config\.json says 32"):
        pixel_request("caption", ModelConfig(family="blip_caption", path=str(folder)), ("squash",))


@pytest.mark.parametrize(
    ("family", "path", "change", "told"),
    [
        ("blip_caption", "config.json", {"vision_config": None}, r"config\.json says 384"),
        ("blip_caption", "config.json", {"vision_config": [1]}, "vision_config is no JSON object"),
        ("vilt", "preprocessor_config.json", {"image_processor": None, "size": None}, "says nothing of size"),
        ("vlm", "processor_config.json", {"image_processor": "tiles"}, "image_processor is no JSON object"),
    ],
)
def test_parts_of_a_configuration_that_are_none_are_refused(
    tmp_path: Path, family: str, path: str, change: dict[str, Any], told: str
) -> None:
    folder = MAKERS[family](tmp_path)
    edit_json(folder / path, change)
    with pytest.raises(WeightsError, match=told):
        pixel_request("answer", ModelConfig(family=family, path=str(folder)), ("squash",))


def test_an_index_that_names_a_pickle_or_a_shard_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = make_captioner(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    lacking = r"lacks 1 of the 2 files that model\.safetensors\.index\.json names: model-2\.safetensors"
    for shard, told in (("pytorch_model.bin", "no safetensors file"), ("model-2.safetensors", lacking)):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": shard}}))
        with pytest.raises(WeightsError, match=told):
            locate(ModelConfig(family="blip_caption", path=str(folder)))
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(WeightsError, match="weight_map names no files"):
        locate(ModelConfig(family="blip_caption", path=str(folder)))
    keys = load_file(folder / "model-1.safetensors").keys()
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, "model-1.safetensors")}))
    assert load_captioner(ModelConfig(family="blip_caption", path=str(folder)), "cpu").caption(random_pixels(1), 3)


def test_a_device_without_memory_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = make_clip(tmp_path / "clip")
    for module, begun in ((open_clip, "create_model"), (clip_module, "load_checkpoint")):
        with monkeypatch.context() as patched:
            patched.setattr(module, begun, full)
            with pytest.raises(
                ModelMemoryError, match=r"^the model of embed does not fit in the memory of this machine$"
            ):
                load_embedder(clip_config(folder), "cpu")
    monkeypatch.setattr(BlipForConditionalGeneration, "from_pretrained", full)
    with pytest.raises(ModelMemoryError, match="the model of caption"):
        load_captioner(ModelConfig(family="blip_caption", path=str(make_captioner(tmp_path / "blip"))), "cpu")
