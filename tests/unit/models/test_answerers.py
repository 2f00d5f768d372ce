"""The adapters that answer questions, against transformers with the same weights, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from transformers import (
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    ViltForQuestionAnswering,
    ViltImageProcessor,
)

from tests.models import IMAGE_SIZE, make_blip_vqa, make_captioner, make_vilt, random_pixels
from vlmflow.config import ModelConfig
from vlmflow.errors import QuestionError
from vlmflow.models import Answer, Answerer, load_answerer, load_captioner
from vlmflow.models.towers import VisionTowers

STARTER = Path(__file__).parents[3] / "vlmflow" / "starter"
QUESTIONS = ["a red car", "two dogs and a cat on the table", "a", "four yellow apples"]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip_vqa(tmp_path_factory.mktemp("blip_vqa"))


@pytest.fixture(scope="module")
def vilt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vilt(tmp_path_factory.mktemp("vilt"))


def load(family: str, folder: Path, towers: VisionTowers | None = None) -> Answerer:
    return load_answerer(ModelConfig.model_validate({"family": family, "path": str(folder)}), "cpu", towers=towers)


def as_images(pixels: torch.Tensor) -> list[Image.Image]:
    return [to_pil_image(image) for image in pixels]


def vilt_reference(folder: Path, pixels: torch.Tensor, questions: list[str]) -> list[Answer]:
    """As the library's documentation does it: one image and one question at a time."""
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), ViltImageProcessor.from_pretrained(folder)
    found = []
    for image, question in zip(as_images(pixels), questions, strict=True):
        inputs = dict(tokenizer(question, return_tensors="pt")) | dict(processor(image, return_tensors="pt"))
        with torch.inference_mode():
            scores = model(**inputs).logits[0].softmax(dim=-1)
        best = int(scores.argmax())
        found.append(Answer(model.config.id2label[best], float(scores[best])))
    return found


def blip_reference(folder: Path, pixels: torch.Tensor, questions: list[str]) -> list[str]:
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), BlipImageProcessor.from_pretrained(folder)
    found = []
    for image, question in zip(as_images(pixels), questions, strict=True):
        inputs = dict(tokenizer(question, return_tensors="pt", return_token_type_ids=False))
        inputs["pixel_values"] = processor(image, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        found.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    return found


def check_vilt(folder: Path, pixels: torch.Tensor, questions: list[str]) -> set[str]:
    """All pairs at once, in a batch of mixed lengths, against one after the other; returns the answers given."""
    count = len(pixels)
    expected = vilt_reference(folder, pixels.repeat_interleave(len(questions), dim=0), questions * count)
    given = [answer for answers in load("vilt", folder).answer(pixels, [questions] * count) for answer in answers]
    assert [answer.text for answer in given] == [answer.text for answer in expected]
    np.testing.assert_allclose([a.score for a in given], [a.score for a in expected], atol=1e-5)
    return {answer.text for answer in given}


def test_vilt_answers_as_transformers_does(vilt_folder: Path) -> None:
    assert len(check_vilt(vilt_folder, random_pixels(6), QUESTIONS)) > 2, "the answers must differ"


def test_vilt_interpolates_positions_as_transformers_does(tmp_path: Path) -> None:
    folder = make_vilt(tmp_path, patches=6)  # positions for 6 x 6 patches, pixels for 4 x 4
    assert len(check_vilt(folder, random_pixels(4), QUESTIONS)) > 1


def test_the_starter_answers_as_transformers_does() -> None:
    questions = ["what color is the background?", "how many dogs are there?", "is there a cat?"]
    answers = check_vilt(STARTER / "vqa", random_pixels(6, size=64), questions)
    assert len(answers) > 2


def test_blip_writes_what_generate_writes(blip_folder: Path) -> None:
    pixels = random_pixels(6)
    expected = blip_reference(blip_folder, pixels.repeat_interleave(len(QUESTIONS), dim=0), QUESTIONS * len(pixels))
    given = load("blip_vqa", blip_folder).answer(pixels, [QUESTIONS] * len(pixels))
    assert [answer.text for answers in given for answer in answers] == expected
    assert len(set(expected)) > 4, "the answers must differ"
    assert len({len(text) for text in expected}) > 1
    assert all(0 < answer.score <= 1 for answers in given for answer in answers)


def test_the_score_of_blip_is_the_probability_of_the_whole_answer(blip_folder: Path) -> None:
    pixels = random_pixels(1)
    ((answer,),) = load("blip_vqa", blip_folder).answer(pixels, [["a red car"]])
    model = BlipForQuestionAnswering.from_pretrained(blip_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(blip_folder)
    inputs = BlipImageProcessor.from_pretrained(blip_folder)(as_images(pixels), return_tensors="pt")
    with torch.inference_mode():
        images = model.vision_model(**inputs).last_hidden_state
        ids = tokenizer("a red car", return_tensors="pt")["input_ids"]
        asked = model.text_encoder(input_ids=ids, encoder_hidden_states=images).last_hidden_state
        begin = torch.tensor([[5]])
        tokens = model.generate(input_ids=ids, **inputs, max_new_tokens=20, do_sample=False)
        assert tokens[0, 0] == begin[0, 0]
        logits = model.text_decoder(input_ids=tokens[:, :-1], encoder_hidden_states=asked).logits
    chosen = logits.log_softmax(dim=-1)[0].gather(1, tokens[0, 1:, None]).sum()
    np.testing.assert_allclose(answer.score, float(chosen.exp()), rtol=1e-4)


@pytest.mark.parametrize(("family", "make"), [("vilt", make_vilt), ("blip_vqa", make_blip_vqa)])
def test_each_image_has_its_own_questions(family: str, make: object, tmp_path: Path) -> None:
    assert callable(make)
    answerer = load(family, make(tmp_path))
    pixels = random_pixels(3)
    given = answerer.answer(pixels, [QUESTIONS[:1], [], QUESTIONS[1:]])
    assert [len(answers) for answers in given] == [1, 0, 3]
    alone = [answerer.answer(pixels[2:], [[question]])[0][0] for question in QUESTIONS[1:]]
    assert [answer.text for answer in given[2]] == [answer.text for answer in alone]
    np.testing.assert_allclose([a.score for a in given[2]], [a.score for a in alone], atol=1e-5)
    assert answerer.answer(pixels[:0], []) == []
    assert answerer.answer(pixels[:2], [[], []]) == [[], []]
    with pytest.raises(ValueError, match="3 images but 1 lists of questions"):
        answerer.answer(pixels, [QUESTIONS])


@pytest.mark.parametrize(("family", "make"), [("vilt", make_vilt), ("blip_vqa", make_blip_vqa)])
def test_a_question_that_is_too_long_is_named_with_the_limit(family: str, make: object, tmp_path: Path) -> None:
    assert callable(make)
    answerer = load(family, make(tmp_path))
    answerer.check_questions(QUESTIONS)
    with pytest.raises(QuestionError, match=r"question 'a a a .*\.\.\.' has 52 tokens, the model takes"):
        answerer.check_questions(["a dog", "a " * 50])
    with pytest.raises(QuestionError, match="52 tokens"):
        answerer.answer(random_pixels(1), [["a " * 50]])


def test_blip_shares_its_vision_tower_with_a_captioner_of_equal_weights(tmp_path: Path) -> None:
    answers, captions = make_blip_vqa(tmp_path / "vqa", seed=2), make_captioner(tmp_path / "captioner", seed=2)
    towers = VisionTowers()
    answerer = load("blip_vqa", answers, towers)
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(captions)), "cpu", towers=towers)
    pixels = random_pixels(4, size=IMAGE_SIZE)
    captioner.caption(pixels, 5)
    answerer.answer(pixels, [QUESTIONS] * 4)
    (tower,) = towers._towers.values()
    assert (tower.num_users, tower.num_passes) == (2, 1)
