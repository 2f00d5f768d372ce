"""Folders of weights as people have them: what is wrong with the files is told before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dual_encoders import make_dual_encoder
from tests.models import make_captioner, make_classifier, make_clip, make_judge, make_matcher, make_vilt, random_pixels
from tests.unit.models.test_detectors import output, policy
from tests.unit.models.test_models_weights import Trap, edit_json
from vlmflow.config import CatalogConfig, Job, ModelConfig, PoolConfig, SourceConfig
from vlmflow.engine.loading import check_weights
from vlmflow.errors import ModelMemoryError, WeightsError
from vlmflow.models import detectors as detectors_module
from vlmflow.models import identify, load_answerer, load_captioner, load_embedder, load_matcher, locate
from vlmflow.models.classifier import ImageClassifier
from vlmflow.models.detectors import load_detector, prepare_detectors
from vlmflow.models.pretrained import check_numbers
from vlmflow.models.weights import find_weights, weights_digest
from vlmflow.moderation.policy import Policy
from vlmflow.search.describe import ImageDescriber
from vlmflow.search.query import Query, QueryEncoder
from vlmflow.tasks.setup import prepare_prompts, prepare_tasks

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 598641023\n"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    makers: dict[str, Callable[[Path], Path]] = {
        "open_clip": make_clip,
        "dual_encoder": make_dual_encoder,
        "blip_caption": make_captioner,
        "blip_itm": make_matcher,
        "vilt": make_vilt,
        "vlm": make_judge,
        "image_classification": make_classifier,
    }
    return {family: make(root / family) for family, make in makers.items()}


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["blip_caption"], tmp_path / "captioner")


def captioner(folder: Path | str) -> ModelConfig:
    return ModelConfig(family="blip_caption", path=str(folder))


def load(family: str, folder: Path) -> Any:
    config = ModelConfig(family=family, path=str(folder))
    if family == "image_classification":
        return ImageClassifier.load(locate(config), config, ["hentai"], "cpu")
    roles: dict[str, Callable[..., Any]] = {"blip_caption": load_captioner, "blip_itm": load_matcher}
    roles |= {"open_clip": load_embedder, "dual_encoder": load_embedder}
    return roles.get(family, load_answerer)(config, "cpu")


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def rename(name: str) -> Change:
    return lambda folder: weights(folder).rename(folder / name)


def to_dangling_link(folder: Path) -> None:
    weights(folder).unlink()
    weights(folder).symlink_to("../../blobs/4d7a21")


def to_cache(folder: Path) -> None:
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(snapshot / path.name)


def to_adapter(folder: Path) -> None:
    weights(folder).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def to_whole_numbers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (tensor * 9).to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in found.items()}


def with_mark(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def to_index(names: dict[str, str]) -> Change:
    def change(folder: Path) -> None:
        weights(folder).rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return change


_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "told", "remedy"),
    [
        (
            lambda folder: weights(folder).write_bytes(POINTER),
            r"model\.safetensors is a pointer of git-lfs",
            "lfs pull",
        ),
        (lambda folder: (folder / "vocab.txt").write_bytes(POINTER), r"vocab\.txt is a pointer of git-lfs", "lfs pull"),
        (lambda folder: (folder / "config.json").write_bytes(POINTER), r"config\.json is a pointer", "lfs pull"),
        (lambda folder: weights(folder).write_bytes(b""), r"no whole safetensors file: .* \(0 bytes\)", "whole"),
        (lambda folder: weights(folder).write_bytes(b"<!DOCTYPE html>" * 99), "no whole safetensors file", "SHA-256"),
        (lambda folder: os.truncate(weights(folder), 9999), "no whole safetensors file", "SHA-256"),
        (rename("model.safetensors.incomplete"), "is a download that has not finished", "Put the files"),
        (rename("model-Q4_K_M.gguf"), r"gguf is of llama\.cpp", "Put the files"),
        (rename("weights.safetensors"), r"; weights\.safetensors is none of model\.safetensors", "Put the files"),
        (rename(_FIRST), rf"has shards \({_FIRST}\), but not model\.safetensors\.index\.json", "Put the files"),
        (to_index({"a": _FIRST, "b": f"../{_SECOND}"}), "weight_map names no files of the folder", "Copy"),
        (to_dangling_link, r"is a link to \.\./\.\./blobs/4d7a21, which is not there", "cp -rL"),
        (to_cache, "is a cache of the hub", "snapshots/aaaa"),
        (to_adapter, "holds an adapter of PEFT", "merge_and_unload"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter of PEFT", "merge"),
        (
            lambda folder: edit_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq"}}),
            r"quantization_config \(gptq\): the family blip_caption reads no quantized weights",
            "float32",
        ),
        (
            lambda folder: rewrite(weights(folder), to_whole_numbers),
            r"is quantized: \d+ weights are whole numbers: .* \(I8\)",
            "float32",
        ),
        (
            with_mark,
            r"config\.json is not JSON: Unexpected UTF-8 BOM",
            "Copy",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_when_it_is_planned(
    folder: Path, change: Change, told: str, remedy: str
) -> None:
    assert identify("caption", captioner(folder))
    change(folder)
    with pytest.raises(WeightsError, match=told) as caught:
        identify("caption", captioner(folder))
    assert str(folder) in str(caught.value)
    assert remedy in caught.value.remedy


def test_a_pickle_is_still_told_of_first_where_it_lies_alone(folder: Path, tmp_path: Path) -> None:
    weights(folder).unlink()
    torch.save(Trap(tmp_path / "mark"), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is a pickle"):
        locate(captioner(folder))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("config.json", "is a file"),
        ("~nobody-of-this-name/models", "no folder ~nobody-of-this-name"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_path_that_is_no_folder_is_told(folder: Path, path: str, told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        locate(captioner(path if path.startswith("~") else folder / path))


def test_a_folder_that_may_not_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    folder.chmod(0)
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(WeightsError, match="Permission denied") as caught:
            identify("caption", captioner(folder))
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert "read the folder" in caught.value.remedy


@pytest.mark.parametrize("name", ["with space", "a#b%20c", "模型-é"])
def test_folders_of_any_name_are_read_also_from_home(
    made: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made["open_clip"], tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ModelConfig(family="open_clip", path=f"~/{name}")
    expected = load("open_clip", made["open_clip"]).embed_texts(["a dog"])
    np.testing.assert_array_equal(load_embedder(config, "cpu").embed_texts(["a dog"]), expected)
    job = starter_job(Path(f"~/{name}"), tasks=("embed",))
    assert prepare_tasks(job).models["embed"].path == str(tmp_path / name), "what workers in other folders are given"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_precisions_are_computed_with_as_they_are(
    made: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    given, same = (shutil.copytree(made["open_clip"], tmp_path / name) for name in ("given", "same"))
    (path,) = find_weights(given, "open_clip")
    rewrite(path, lambda found: {name: tensor.to(dtype) for name, tensor in found.items()})
    rewrite(same / path.name, lambda found: {name: tensor.to(dtype).float() for name, tensor in found.items()})
    vectors = [load("open_clip", folder).embed_images(random_pixels(2)) for folder in (given, same)]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("family", ["open_clip", "dual_encoder", "blip_caption", "vilt", "vlm", "image_classification"])
def test_weights_that_are_no_numbers_are_refused(
    made: dict[str, Path], tmp_path: Path, family: str, value: float
) -> None:
    folder = shutil.copytree(made[family], tmp_path / family)
    (path,) = find_weights(folder, family)
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"not finite, in 1 tensors: .*weight"):
        load(family, folder)


def test_of_tensors_that_are_missing_no_numbers_are_asked(tmp_path: Path) -> None:
    """Their memory may be as it was found, and a damaged file would be told of instead of the wrong one."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.data.fill_(float("nan"))
    check_numbers(tmp_path, layer, missing=["weight"])
    with pytest.raises(WeightsError, match="not finite, in 1 tensors: weight"):
        check_numbers(tmp_path, layer)


@pytest.mark.parametrize("family", ["dual_encoder", "vilt", "image_classification", "blip_itm"])
def test_who_writes_to_a_file_changes_no_model_at_work(made: dict[str, Path], tmp_path: Path, family: str) -> None:
    """transformers maps the file into memory, and `cp` and `rsync --inplace` write into the file that is there."""
    folder = shutil.copytree(made[family], tmp_path / family)
    model = load(family, folder)
    maps = Path("/proc/self/maps").read_text()
    assert str(folder) not in maps
    assert model is not None


def test_a_file_replaced_by_one_of_equal_size_and_time_is_another(folder: Path) -> None:
    path, before = weights(folder), weights_digest(folder, "blip_caption")
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert weights_digest(folder, "blip_caption") != before


def test_a_vision_language_model_without_tokens_to_fill_up_with_is_refused(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(made["vlm"], tmp_path / "vlm")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(WeightsError, match="no padding token"):
        load("vlm", folder)


def starter_job(folder: Path, **other: Any) -> Job:
    models = {"embed": ModelConfig(family="open_clip", path=str(folder))}
    places = {"source": SourceConfig(uri="."), "catalog": CatalogConfig(uri=".")}
    return Job(profile="starter", models=models, policy="demo", accept_unbound=True, **places, **other)


def test_weights_that_change_between_planning_and_loading_are_refused(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made["open_clip"], tmp_path / "clip")
    job = starter_job(folder, tasks=("embed", "moderate"))
    setup, encoder = prepare_tasks(job), QueryEncoder(job)
    (path,) = find_weights(folder, "open_clip")
    rewrite(path, lambda found: found | {"logit_scale": found["logit_scale"] + 1})
    with pytest.raises(WeightsError, match=f"{folder} has changed since it was looked at"):
        prepare_prompts(setup)
    with pytest.raises(WeightsError, match=f"{folder} has changed since it was looked at"):
        encoder.encode(Query(text="a dog"))


def test_a_worker_with_another_detector_than_was_planned_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["image_classification"], tmp_path / "classifier")
    setup = prepare_tasks(starter_job(made["open_clip"], tasks=("embed", "moderate")))
    detectors = prepare_detectors(classifier_policy(folder), ("squash",))
    setup, pool = replace(setup, detectors=detectors), PoolConfig(tasks=("detect",))
    check_weights(pool, setup)
    rewrite(weights(folder), lambda found: {name: tensor + 1 for name, tensor in found.items()})
    with pytest.raises(WeightsError, match="weights of detector it on this node have the digest"):
        check_weights(pool, setup)


def classifier_policy(folder: Path) -> Policy:
    return policy(family="image_classification", path=str(folder), outputs={"hentai": output()})


def test_a_detector_without_memory_is_told_of(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (setup,) = prepare_detectors(classifier_policy(made["image_classification"]), ("squash",))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(detectors_module, "_load", full)
    with pytest.raises(ModelMemoryError, match=r"^the detector it does not fit in the memory of this machine$"):
        load_detector(setup, "cpu")


@pytest.mark.parametrize(
    "use",
    [
        ImageDescriber,
        lambda job: QueryEncoder(job).encode(Query(text="a dog")),
        lambda job: prepare_prompts(prepare_tasks(job)),
    ],
)
def test_outside_of_pools_a_model_without_memory_is_told_of(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, use: Callable[[Job], object]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")

    monkeypatch.setattr("vlmflow.models.clip.load_checkpoint", full)
    with pytest.raises(ModelMemoryError, match=r"^the model of embed does not fit in the memory of this machine$"):
        use(starter_job(made["open_clip"], tasks=("embed", "moderate")))
