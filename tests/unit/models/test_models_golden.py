"""Outputs move only together with the adapter's code version: rows made by another version are due again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.dual_encoders import make_dual_encoder
from tests.families import make_align, make_blip2_captioner, make_blip2_matcher, make_flava, make_git
from tests.models import (
    IMAGE_SIZE,
    make_blip_vqa,
    make_captioner,
    make_classifier,
    make_clip,
    make_judge,
    make_matcher,
    make_vilt,
)
from tests.vilbert import make_vilbert
from vlmflow.config import ModelConfig
from vlmflow.families import FAMILIES
from vlmflow.models import ModelIdentity, load_answerer, load_captioner, load_embedder, load_matcher
from vlmflow.models.classifier import ImageClassifier
from vlmflow.models.judge import VlmJudge
from vlmflow.models.opennsfw import OpenNsfw
from vlmflow.models.vilbert.adapter import VilbertGrounder
from vlmflow.models.vilbert.regions import Regions
from vlmflow.models.vlm import TransformersChat

CODE_VERSIONS = {name: family.code_version for name, family in FAMILIES.items()}
ELSEWHERE = ("vllm", "endpoint")  # what they give is not computed by code of ours
RECORDED = json.loads((Path(__file__).parent / "golden.json").read_text())


def fill_by_formula(path: Path) -> None:
    """Weights that depend on no random number generator."""
    tensors = load_file(path)
    for index, name in enumerate(sorted(tensors)):
        old = tensors[name]
        if not old.is_floating_point():
            continue
        wave = torch.sin(torch.arange(old.numel(), dtype=torch.float64) * 0.7391 + index).reshape(old.shape)
        fan_in = old.shape[-1] if old.ndim > 1 else 1
        is_norm = old.ndim == 1 and name.endswith("weight")
        tensors[name] = ((1 + 0.1 * wave) if is_norm else wave * (1.4 / fan_in**0.5 if old.ndim > 1 else 0.1)).float()
        if name.endswith("running_var"):
            tensors[name] = (0.1 + 0.05 * wave).float()
    save_file(tensors, path, {"format": "pt"})


def formula_pixels(num_images: int, size: int = IMAGE_SIZE) -> torch.Tensor:
    wave = torch.sin(torch.arange(num_images * 3 * size**2, dtype=torch.float64) * 0.0137)
    return ((wave + 1) * 127.5).to(torch.uint8).reshape(num_images, 3, size, size)


def rounded(values: np.ndarray[Any, Any]) -> list[Any]:
    return values.astype(np.float64).round(5).tolist()


def outputs(folder: Path) -> dict[str, Any]:
    pixels = formula_pixels(3)
    clip, captioner, matcher = make_clip(folder / "a"), make_captioner(folder / "b"), make_matcher(folder / "c")
    answerers = {"vilt": make_vilt(folder / "v"), "blip_vqa": make_blip_vqa(folder / "w")}
    classifier, yes_or_no = make_classifier(folder / "d"), make_judge(folder / "e", chat=True)
    for path in folder.glob("*/*.safetensors"):
        fill_by_formula(path)
    embedder = load_embedder(ModelConfig(family="open_clip", path=str(clip)), "cpu")
    speaker = load_captioner(ModelConfig(family="blip_caption", path=str(captioner)), "cpu")
    judge = load_matcher(ModelConfig(family="blip_itm", path=str(matcher)), "cpu")
    images, texts = judge.encode_images(pixels), ["a red car", "two dogs", "a"]
    answers = {
        family: [
            answer
            for row in load_answerer(ModelConfig.model_validate({"family": family, "path": str(path)}), "cpu").answer(
                pixels, [texts] * 3
            )
            for answer in row
        ]
        for family, path in answerers.items()
    }
    classifying = ModelConfig(family="image_classification", path=str(classifier))
    vectors = np.concatenate([embedder.embed_images(pixels), embedder.embed_texts(texts)])
    return {
        "open_clip": rounded(vectors[:, :6]),
        "blip_caption": speaker.caption(pixels, 8),
        "opennsfw": rounded(OpenNsfw.load().score(formula_pixels(3, 256))),
        "image_classification": rounded(
            ImageClassifier.load(classifier, classifying, ("hentai", "neutral"), "cpu").score(pixels)
        ),
        "vlm_judge": rounded(VlmJudge.load(yes_or_no, ["Does the picture show a gun?"], "cpu").score(pixels)),
        "vilt": rounded(np.array([answer.score for answer in answers["vilt"]])),
        "blip_vqa": [answer.text for answer in answers["blip_vqa"]],
        "vlm": [
            answer.text
            for answer in TransformersChat.load(yes_or_no, "cpu").write(pixels, ["Does the picture show a gun?"] * 3, 6)
        ],
        "blip_itm": [rounded(judge.match_itm(images, texts)), rounded(judge.match_itc(images, texts))],
        **other_outputs(folder, pixels, texts),
        "vilbert": vilbert_outputs(folder / "vilbert", texts),
    }


def vilbert_outputs(folder: Path, texts: list[str]) -> list[Any]:
    """Of regions that are given; its weights depend on a stream that never changes."""
    path = make_vilbert(folder, {"kind": "columns", "max_regions": 4})
    wave = torch.sin(torch.arange(3 * 4 * 12, dtype=torch.float64) * 0.7391).float().reshape(3, 4, 12)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0, 0, 0.3, 0.3], [0.4, 0, 1, 1], [0.5, 0.5, 0.6, 0.8]]).expand(3, 4, 4)
    regions = Regions(wave, boxes, torch.ones(3, 4, dtype=torch.bool))
    config = ModelConfig(family="vilbert", path=str(path))
    matcher, answerer = load_matcher(config, "cpu"), load_answerer(config, "cpu")
    matched = matcher.match_itm(matcher.encode_images(regions), texts)
    answered = np.array([answer.score for of in answerer.answer(regions, [texts] * 3) for answer in of])
    grounded = VilbertGrounder.load(path).ground(regions, [[text] for text in texts])
    return rounded(np.concatenate([matched, answered, *(of[0].scores for of in grounded)]))


def other_outputs(folder: Path, pixels: torch.Tensor, texts: list[str]) -> dict[str, Any]:
    folders = {
        "blip2_caption": make_blip2_captioner(folder / "f"),
        "blip2_itm": make_blip2_matcher(folder / "g"),
        "git": make_git(folder / "h"),
        "flava": make_flava(folder / "i"),
        "align": make_align(folder / "j"),
        "dual_encoder": make_dual_encoder(folder / "k"),
    }
    for path in folders.values():
        fill_by_formula(path / "model.safetensors")
    configs = {family: ModelConfig(family=family, path=str(path)) for family, path in folders.items()}
    found: dict[str, Any] = {
        family: load_captioner(configs[family], "cpu").caption(pixels, 8) for family in ("blip2_caption", "git")
    }
    for family in ("blip2_itm", "flava", "align", "dual_encoder"):
        matcher = load_matcher(configs[family], "cpu")
        images = matcher.encode_images(pixels)
        values = [matcher.match_itc(images, texts), matcher.match_itm(images, texts)]
        if family != "blip2_itm":
            embedder = load_embedder(configs[family], "cpu")
            values += [embedder.embed_images(pixels)[:, :3].ravel(), embedder.embed_texts(texts)[:, :3].ravel()]
        found[family] = rounded(np.concatenate([part for part in values if part is not None]))
    return found


def test_outputs_are_those_recorded_for_the_code_version(tmp_path: Path) -> None:
    found = outputs(tmp_path)
    for family, version in CODE_VERSIONS.items():
        if family in ELSEWHERE:
            continue
        recorded = RECORDED.get(f"{family} {version}")
        assert recorded is not None, f"{family} {version}: run this file, which records what `outputs` computes of it"
        message = f"{family}: outputs moved. If that is meant, raise its code version and record the new ones."
        if family in ("blip_caption", "blip_vqa", "vlm", "blip2_caption", "git"):
            assert found[family] == recorded, message
        else:
            np.testing.assert_allclose(found[family], recorded, atol=2e-4, err_msg=message)


def test_a_fingerprint_follows_everything_but_the_machine() -> None:
    identity = ModelIdentity("org/model", "local", "0" * 64, "[224]", 1)
    fingerprint = identity.fingerprint("embed")
    assert fingerprint == ModelIdentity("org/model", "local", "0" * 64, "[224]", 1).fingerprint("embed")
    changed = {"id": "x", "revision": "x", "weights_digest": "1" * 64, "preprocessing": "[384]", "code_version": 2}
    others = [ModelIdentity(**{**vars(identity), name: value}).fingerprint("embed") for name, value in changed.items()]
    assert len({fingerprint, identity.fingerprint("caption"), *others}) == 2 + len(changed)


if __name__ == "__main__":  # records the outputs of the present code versions
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        now = outputs(Path(name))
    path = Path(__file__).parent / "golden.json"
    recorded = RECORDED | {f"{family} {v}": now[family] for family, v in CODE_VERSIONS.items() if family in now}
    path.write_text(json.dumps(recorded, indent=1) + "\n")
