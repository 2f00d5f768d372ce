"""ViLBERT as a matcher, an answerer and a grounder, with regions of every kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from tests.models import make_clip, random_pixels, write_json
from tests.vilbert import make_detector, make_vilbert
from vlmflow.config import ModelConfig
from vlmflow.errors import QuestionError, WeightsError
from vlmflow.models import identify, load_answerer, load_matcher, pixel_request
from vlmflow.models.vilbert.adapter import VilbertGrounder
from vlmflow.models.vilbert.detector import load_detector_regions
from vlmflow.models.vilbert.finders import DetectorRegions
from vlmflow.models.vilbert.regions import Regions, best_boxes, pad_regions, with_whole_image

COLUMNS = {"kind": "columns", "max_regions": 4}


def regions(counts: tuple[int, ...] = (3, 1, 4), num_features: int = 12) -> Regions:
    rng = np.random.RandomState(0)
    features, boxes = [], []
    for count in counts:
        features.append(torch.from_numpy(rng.standard_normal((count, num_features)).astype(np.float32)))
        corner = rng.uniform(0, 0.5, (count, 2))
        sides = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (count, 2))], axis=1)
        boxes.append(torch.from_numpy(sides.astype(np.float32)))
    return pad_regions(features, boxes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vilbert(tmp_path_factory.mktemp("vilbert") / "m", COLUMNS)


def config(folder: Path) -> ModelConfig:
    return ModelConfig(family="vilbert", path=str(folder))


def test_the_whole_image_comes_first_with_the_mean_of_its_regions() -> None:
    given = regions((2, 0))
    features, places, mask = with_whole_image(given)
    torch.testing.assert_close(features[0, 0], given.features[0, :2].mean(0))
    assert features[1, 0].abs().sum() == 0, "an image without regions"
    assert places[:, 0].tolist() == [[0, 0, 1, 1, 1]] * 2
    left, top, right, bottom, area = places[0, 1].tolist()
    assert area == pytest.approx((right - left) * (bottom - top))
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_the_best_boxes_overlap_no_better_one() -> None:
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.9, 1], [0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7], [0.8, 0, 1, 0.2]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.1, 0.7])
    kept = best_boxes(boxes, scores, max_regions=2, min_score=0.2, max_overlap=0.5)
    assert kept.tolist() == [1, 2]


def test_scores_belong_to_the_pair_whatever_else_is_in_the_batch(folder: Path) -> None:
    matcher = load_matcher(config(folder), "cpu")
    given, texts = regions(), ["a red apple", "two dogs on a chair with the picture of a cat", "car"]
    images = matcher.encode_images(given)  # type: ignore[arg-type]
    together = matcher.match_itm(images, texts)
    assert together is not None
    assert ((together > 0) & (together < 1)).all()
    assert len(set(together.tolist())) == 3
    for row, text in enumerate(texts):
        alone = matcher.match_itm(images.take([row]), [text])
        np.testing.assert_allclose(alone, together[row : row + 1], rtol=1e-4)
    assert matcher.match_itc(images, texts) is None
    with pytest.raises(ValueError, match="3 images but 1 texts"):
        matcher.match_itm(images, texts[:1])


def test_a_pretrained_model_matches_with_its_alignment_head(tmp_path: Path) -> None:
    matcher = load_matcher(config(make_vilbert(tmp_path / "m", COLUMNS, heads=["cls"])), "cpu")
    images = matcher.encode_images(regions())
    scores = matcher.match_itm(images, ["a cat", "a dog", "a car"])
    parts = matcher._parts
    encoded = parts.encode(images.stream, parts.tokenizer(["a cat", "a dog", "a car"])["input_ids"], 8)
    logits = parts.model.get_submodule("cls.bi_seq_relationship")(encoded.pair)
    np.testing.assert_allclose(scores, logits.softmax(-1)[:, 0].numpy(), rtol=1e-5)


def test_each_question_gets_an_answer_of_the_list(folder: Path) -> None:
    answerer = load_answerer(config(folder), "cpu")
    asked = [["a red apple", "two dogs"], [], ["how many cats"]]
    given = answerer.answer(regions(), asked)  # type: ignore[arg-type]
    assert [len(answers) for answers in given] == [2, 0, 1]
    for answers in given:
        assert all(answer.text in ("yes", "no", "two", "red", "cat") and 0 < answer.score < 1 for answer in answers)
    alone = answerer.answer(regions(), [[], [], ["how many cats"]])[2][0]  # type: ignore[arg-type]
    assert alone.text == given[2][0].text
    assert alone.score == pytest.approx(given[2][0].score, rel=1e-4)
    assert answerer.answer(regions(), [[], [], []]) == [[], [], []]  # type: ignore[arg-type]
    with pytest.raises(QuestionError, match="tokens, the model takes 20"):
        answerer.check_questions(["a " * 30])
    answerer._parts.model.bert.embeddings.word_embeddings.weight.fill_(math.nan)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a score that is not finite"):
        answerer.answer(regions(), asked)  # type: ignore[arg-type]


def test_a_phrase_ranks_the_regions_of_its_image(folder: Path) -> None:
    given = regions()
    grounder = VilbertGrounder.load(folder)
    first, none, last = grounder.ground(given, [["the red apple", "the dog"], [], ["the chair"]])
    assert [len(first), len(none), len(last)] == [2, 0, 1]
    for row, of in ((0, first[0]), (0, first[1]), (2, last[0])):
        assert (np.diff(of.scores) <= 0).all()
        own = given.boxes[row][given.mask[row]]
        assert sorted(map(tuple, of.boxes.tolist())) == sorted(map(tuple, own.tolist())), "each region once, no padding"
    assert first[0].scores.tolist() != first[1].scores.tolist()
    alone = grounder.ground(regions((3,)), [["the red apple"]])[0][0]
    np.testing.assert_allclose(alone.scores, first[0].scores, rtol=1e-4)


def test_a_detector_of_torchvision_gives_the_features_behind_its_box_head(tmp_path: Path) -> None:
    values = make_detector(tmp_path)
    finder = load_detector_regions(tmp_path / "detector.safetensors", DetectorRegions(**values), "cpu")
    found = finder(random_pixels(2, size=64))
    assert finder.num_features == 1024
    assert found.features.shape == (2, 6, 1024)
    assert found.mask.any(1).all()
    for boxes, mask in zip(found.boxes, found.mask, strict=True):
        kept = boxes[mask]
        assert ((kept >= 0) & (kept <= 1)).all()
        assert (kept[:, 2:] > kept[:, :2]).all()
        overlaps = box_iou(kept, kept).fill_diagonal_(0)
        assert overlaps.max() <= 0.5 + 1e-6


def test_a_model_on_a_detector_is_shown_pixels(tmp_path: Path) -> None:
    values = make_detector(tmp_path / "m")
    folder = make_vilbert(tmp_path / "m", values, num_features=1024)
    request = pixel_request("match", config(folder), ("squash",))
    assert request is not None
    assert request.size == 64
    matcher = load_matcher(config(folder), "cpu")
    pixels = random_pixels(2, size=64)
    scores = matcher.match_itm(matcher.encode_images(pixels), ["a cat", "a dog"])
    assert scores is not None
    assert np.isfinite(scores).all()
    phrase = VilbertGrounder.load(folder).ground(pixels, [["a cat"], ["a dog"]])
    assert all(len(of.boxes) for (of,) in phrase)


def tower_folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    from vlmflow.models.vilbert.tower import BoxHead
    from vlmflow.models.weights import weights_digest

    clip = make_clip(tmp_path / "clip")
    values = {
        "kind": "tower",
        "folder": "../clip",
        "weights_digest": weights_digest(clip, "open_clip"),
        "box_head_width": 8,
        "max_regions": 5,
        "min_score": 0.0,
    }
    folder = make_vilbert(tmp_path / "m", values, num_features=32)
    torch.manual_seed(0)
    save_file(BoxHead(32, 8).state_dict(), folder / "regions.safetensors")
    return folder


def test_a_model_on_a_clip_tower_is_bound_to_its_weights(tmp_path: Path) -> None:
    folder = tower_folder(tmp_path)
    matcher = load_matcher(config(folder), "cpu")
    images = matcher.encode_images(random_pixels(3))
    scores = matcher.match_itm(images, ["a cat", "a dog", "a car"])
    assert scores is not None
    assert np.isfinite(scores).all()
    make_clip(tmp_path / "clip", seed=5)
    with pytest.raises(WeightsError, match="other weights"):
        load_matcher(config(folder), "cpu")


def test_identity_covers_answers_and_regions(tmp_path: Path) -> None:
    folder = make_vilbert(tmp_path / "m", COLUMNS)
    digests = [identify("answer", config(folder)).weights_digest]
    write_json(folder / "answers.json", ["no", "yes", "two", "red", "cat"])
    digests.append(identify("answer", config(folder)).weights_digest)
    write_json(folder / "regions.json", COLUMNS | {"max_regions": 3})
    digests.append(identify("answer", config(folder)).weights_digest)
    assert len(set(digests)) == 3
    assert pixel_request("answer", config(folder), ("squash",)) is None


def broken(folder: Path, what: str) -> None:
    if what == "detector":
        write_json(folder / "regions.json", make_detector(folder))  # 1024 features, the model reads 12
    elif what == "unknown detector":
        write_json(folder / "regions.json", make_detector(folder) | {"architecture": "yolo"})
    elif what == "answers":
        write_json(folder / "answers.json", ["yes"])
    elif what == "kind":
        write_json(folder / "regions.json", {"kind": "magic", "max_regions": 3})
    elif what == "vocabulary":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (folder / "vocab.txt").write_text("\n".join([*special, *(f"word{number}" for number in range(200))]))
    elif what == "no unknown words":
        (folder / "vocab.txt").write_text("\n".join(f"word{number}" for number in range(9)))
    elif what == "tokenizer":
        (folder / "tokenizer_config.json").write_text("[]")
    elif what == "config":
        values: dict[str, Any] = {"hidden_size": 24}
        write_json(folder / "config.json", values)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("detector", "regions of 1024 features, the model reads 12"),
        ("unknown detector", "yolo"),
        ("answers", "lists 1 answers, the model has 5"),
        ("kind", "kind"),
        ("vocabulary", "a vocabulary of"),
        ("no unknown words", "BertTokenizer.*Missing .UNK. token"),
        ("tokenizer", "cannot be loaded as BertTokenizer"),
        ("config", "vocab_size"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(tmp_path: Path, what: str, told: str) -> None:
    folder = make_vilbert(tmp_path / "m", COLUMNS)
    broken(folder, what)
    with pytest.raises(WeightsError, match=told) as caught:
        load_answerer(config(folder), "cpu")
    assert caught.value.remedy


def test_regions_of_another_detector_are_refused(folder: Path) -> None:
    matcher = load_matcher(config(folder), "cpu")
    with pytest.raises(ValueError, match="regions of 7 features, the model reads 12"):
        matcher.encode_images(regions(num_features=7))
    with pytest.raises(ValueError, match="columns of the source"):
        matcher.encode_images(random_pixels(1))
    assert matcher.encode_images(regions((9,))).embeds.shape[1] == 1 + COLUMNS["max_regions"], "the rest is left out"


def test_a_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = make_vilbert(tmp_path / "m", COLUMNS, heads=["vision_logit"])
    for load, head in ((load_matcher, "vil_logit or cls"), (load_answerer, "vil_prediction")):
        with pytest.raises(WeightsError, match=head):
            load(config(folder), "cpu")
