"""Models of a worker that serve two tasks: one in memory, one pass of an image, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import make_align, make_flava
from tests.models import random_pixels
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import Dtype, ModelConfig
from vlmflow.models import load_embedder, load_matcher
from vlmflow.models.towers import VisionTowers

KINDS = ("clip", "siglip2", "altclip", "align", "flava")
TEXTS = ["a red car", "two dogs", "a", "a table", "a cat", "a red dog"]


@pytest.fixture(scope="module")
def folders(dual_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return dual_encoders | {"align": make_align(root / "align"), "flava": make_flava(root / "flava")}


def config_of(folder: Path, kind: str = "clip") -> ModelConfig:
    return ModelConfig(family=kind if kind in ("align", "flava") else "dual_encoder", path=str(folder))


def both(embed: Path, match: Path, kind: str = "clip", dtypes: tuple[Dtype, Dtype] = ("auto", "auto")) -> Any:
    """An embedder and a matcher of one worker."""
    towers = VisionTowers()
    embedder = load_embedder(config_of(embed, kind), "cpu", dtypes[0], towers)
    return embedder, load_matcher(config_of(match, kind), "cpu", dtypes[1], towers), towers


def scores(matcher: Any, pixels: torch.Tensor) -> list[bytes | None]:
    encoded = matcher.encode_images(pixels)
    found = matcher.match_itm(encoded, TEXTS[: len(pixels)]), matcher.match_itc(encoded, TEXTS[: len(pixels)])
    return [None if values is None else values.tobytes() for values in found]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_files_are_one_model_that_sees_an_image_once_and_gives_what_two_did(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    pixels = random_pixels(6)
    elsewhere = shutil.copytree(folders[kind], tmp_path / "under-another-name")
    embedder, matcher, towers = both(folders[kind], elsewhere, kind)
    assert matcher._embedder is embedder
    passes = embedder.tower.num_passes
    with towers.of_batch():
        vectors, found = embedder.embed_images(pixels), scores(matcher, pixels.clone())
    assert embedder.tower.num_passes == passes + 1

    config = config_of(folders[kind], kind)
    assert load_embedder(config, "cpu").embed_images(pixels).tobytes() == vectors.tobytes()
    assert scores(load_matcher(config, "cpu"), pixels) == found
    texts = embedder.embed_texts(TEXTS)
    assert load_embedder(config, "cpu").embed_texts(TEXTS).tobytes() == texts.tobytes()


@pytest.mark.parametrize("kind", ["siglip2", "flava"])
def test_a_matcher_is_shown_the_first_of_the_views_that_were_embedded(folders: dict[str, Path], kind: str) -> None:
    embedder, matcher, towers = both(folders[kind], folders[kind], kind)
    views, first = random_pixels(8), torch.tensor([0, 3, 4, 7])
    passes = embedder.tower.num_passes
    with towers.of_batch():
        vectors = embedder.embed_images(views)
        encoded = matcher.encode_images(views[first])
        cosines = matcher.match_itc(encoded, TEXTS[:4])
    assert embedder.tower.num_passes == passes + 1
    texts = embedder.embed_texts(TEXTS[:4])
    np.testing.assert_allclose(cosines, (vectors[first] * texts).sum(axis=1), atol=1e-6)
    assert np.ptp(cosines) > 0.01


def test_behind_a_batch_an_image_is_seen_anew(folders: dict[str, Path]) -> None:
    """As in a preflight, which shows its few images again and again, and would measure nothing."""
    embedder, matcher, towers = both(folders["clip"], folders["clip"])
    pixels, passes = random_pixels(3), embedder.tower.num_passes
    for _ in range(2):
        with towers.of_batch():
            embedder.embed_images(pixels)
            matcher.encode_images(pixels)
    assert embedder.tower.num_passes == passes + 2


def with_one_other_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.startswith("vision_model") and name.endswith("bias"))
    tensors[name][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_another_mean(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", {"image_mean": [0.4, 0.4, 0.4]})


def with_another_activation(folder: Path) -> None:
    edit_json(folder / "config.json", {"vision_config.hidden_act": "gelu"})


@pytest.mark.parametrize("change", [with_one_other_weight, with_another_mean, with_another_activation])
def test_models_that_differ_are_two(folders: dict[str, Path], tmp_path: Path, change: Any) -> None:
    other = shutil.copytree(folders["clip"], tmp_path / "clip")
    change(other)
    embedder, matcher, towers = both(folders["clip"], other)
    assert matcher._embedder is not embedder
    pixels = random_pixels(3)
    with towers.of_batch():
        embedder.embed_images(pixels)
        found = scores(matcher, pixels)
    assert scores(load_matcher(config_of(other), "cpu"), pixels) == found


def test_models_of_two_dtypes_are_two(folders: dict[str, Path]) -> None:
    embedder, matcher, _ = both(folders["clip"], folders["clip"], dtypes=("float32", "bfloat16"))
    assert matcher._embedder is not embedder


def test_without_a_worker_nothing_is_shared_or_kept(folders: dict[str, Path]) -> None:
    embedder: Any = load_embedder(config_of(folders["clip"]), "cpu")
    matcher: Any = load_matcher(config_of(folders["clip"]), "cpu")
    assert matcher._embedder is not embedder
    assert embedder.tower.num_users == 0
