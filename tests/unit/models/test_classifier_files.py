"""What the files of an image classifier say of its classes, and of what it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.models import as_images, make_classifier, random_pixels, write_json
from tests.unit.models.test_detectors import output, policy
from tests.unit.models.test_models_weights import edit_json
from vlmflow.errors import DetectorError, WeightsError
from vlmflow.models.detectors import load_detector, prepare_detectors


def test_names_of_classes_that_are_a_list_are_refused(tmp_path: Path) -> None:
    edit_json(make_classifier(tmp_path) / "config.json", {"id2label": ["drawings", "hentai", "neutral"]})
    given = policy(family="image_classification", path=str(tmp_path), outputs={"hentai": output()})
    with pytest.raises(WeightsError, match="id2label is no JSON object"):
        prepare_detectors(given, ("squash",))


@pytest.fixture
def of_timm(tmp_path: Path) -> Path:
    """A classifier as timm publishes it: its config.json alone says what it is shown, and names the classes."""
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", num_classes=2).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    pretrained = {"input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.4] * 3}
    config = {
        "architecture": "test_vit",
        "num_classes": 2,
        "label_names": ["SFW", "NSFW"],
        "pretrained_cfg": pretrained,
    }
    write_json(tmp_path / "config.json", config)
    return tmp_path


def test_a_classifier_of_timm_scores_as_in_transformers(of_timm: Path) -> None:
    given = policy(family="image_classification", path=str(of_timm), outputs={"NSFW": output()})
    (setup,) = prepare_detectors(given, ("squash",))
    assert (setup.request.size, setup.request.interpolation) == (160, "bicubic")
    pixels = random_pixels(3, size=160)
    images = AutoImageProcessor.from_pretrained(of_timm)(as_images(pixels), return_tensors="pt")
    model = AutoModelForImageClassification.from_pretrained(of_timm).eval()
    with torch.inference_mode():
        expected = model(**images).logits.softmax(-1)[:, 1]
    found = load_detector(setup, "cpu").score(pixels)[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.02

    edit_json(of_timm / "config.json", {"label_names": None})
    with pytest.raises(DetectorError, match="has no output NSFW") as caught:
        prepare_detectors(given, ("squash",))
    assert "id2label" in caught.value.remedy


def test_what_timm_would_download_is_refused(of_timm: Path) -> None:
    given = policy(family="image_classification", path=str(of_timm), outputs={"NSFW": output()})
    edit_json(of_timm / "config.json", {"architecture": "hf-hub:timm/test_vit.r160_in1k"})
    (setup,) = prepare_detectors(given, ("squash",))
    with pytest.raises(WeightsError, match=r"hf-hub:timm/test_vit\.r160_in1k, which timm downloads"):
        load_detector(setup, "cpu")


@pytest.mark.parametrize(("names", "asked"), [(None, "LABEL_1"), ({0: "safe", 1: 18}, "18")])
def test_classes_without_names_of_their_own_go_by_those_of_transformers(
    tmp_path: Path, names: dict[int, object] | None, asked: str
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=2, **sizes)).eval()
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"id2label": names})
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    given = policy(family="image_classification", path=str(tmp_path), outputs={asked: output()})
    (setup,) = prepare_detectors(given, ("squash",))
    pixels = random_pixels(3)
    with torch.inference_mode():
        logits = model(**processor(list(pixels), return_tensors="pt")).logits
    np.testing.assert_allclose(load_detector(setup, "cpu").score(pixels)[:, 0], logits.softmax(-1)[:, 1], atol=1e-5)

    given = policy(family="image_classification", path=str(tmp_path), outputs={"nsfw": output()})
    with pytest.raises(DetectorError, match="has no output nsfw") as caught:
        prepare_detectors(given, ("squash",))
    assert asked in caught.value.remedy


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    edit_json(make_classifier(tmp_path) / "config.json", {"id2label": {"0": "nsfw", "1": "safe", "2": "nsfw"}})
    given = policy(family="image_classification", path=str(tmp_path), outputs={"nsfw": output()})
    with pytest.raises(DetectorError, match="several outputs called nsfw") as caught:
        prepare_detectors(given, ("squash",))
    assert "id2label" in caught.value.remedy
    given = policy(family="image_classification", path=str(tmp_path), outputs={"safe": output()})
    assert prepare_detectors(given, ("squash",))[0].outputs == ("safe",)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}),
        ("config.json", {"id2label": {"0": "drawings", "1": "neutral", "7": "hentai"}}),
    ],
)
def test_files_that_contradict_each_other_are_refused_before_any_image(
    tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    edit_json(make_classifier(tmp_path) / name, change)
    given = policy(family="image_classification", path=str(tmp_path), outputs={"hentai": output()})
    (setup,) = prepare_detectors(given, ("squash",))
    with pytest.raises(WeightsError, match="cannot score an image of") as caught:
        load_detector(setup, "cpu")
    assert "of one model" in caught.value.remedy


def test_a_single_class_is_a_sigmoid_or_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=32, patch_size=8, id2label={0: "nsfw"}, label2id={"nsfw": 0}, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    given = policy(family="image_classification", path=str(tmp_path), outputs={"nsfw": output()})
    with pytest.raises(DetectorError, match="has one class, whose softmax is 1") as caught:
        prepare_detectors(given, ("squash",))
    assert "multi_label_classification" in caught.value.remedy
    edit_json(tmp_path / "config.json", {"problem_type": "multi_label_classification"})
    (setup,) = prepare_detectors(given, ("squash",))
    scores = load_detector(setup, "cpu").score(random_pixels(3))
    assert len(set(scores[:, 0].tolist())) == 3
    assert ((scores > 0) & (scores < 1)).all()
