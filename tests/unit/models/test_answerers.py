"""The adapters that answer questions, against transformers with the same weights, in float32 on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
)

from benchmarks.clip_cpu import demo_pixels
from tests.models import (
    IMAGE_SIZE,
    as_images,
    make_blip_vqa,
    make_captioner,
    make_judge,
    make_vilt,
    random_pixels,
    write_json,
)
from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import QuestionError
from vlmflow.imaging import PixelRequest
from vlmflow.models import Answer, Answerer, load_answerer, load_captioner, pretrained, vilt_fast
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.profiles import PROFILES
from vlmflow.models.towers import VisionTowers
from vlmflow.models.vilt_fast import ViltTower
from vlmflow.tasks.answer import AnswerTask
from vlmflow.tasks.run import BatchLimit, run_contained

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
    """Batches of mixed lengths against one pair after the other; returns the answers given."""
    count = len(pixels)
    expected = vilt_reference(folder, pixels.repeat_interleave(len(questions), dim=0), questions * count)
    given = [answer for answers in load("vilt", folder).answer(pixels, [questions] * count) for answer in answers]
    assert [answer.text for answer in given] == [answer.text for answer in expected]
    np.testing.assert_allclose([a.score for a in given], [a.score for a in expected], atol=1e-5)
    return {answer.text for answer in given}


@pytest.mark.parametrize("tokens_at_once", [1, 60, 1024])  # 1, 2, and all of the 24 pairs
def test_vilt_answers_as_transformers_does(
    vilt_folder: Path, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    monkeypatch.setattr(vilt_fast, "TOKENS_AT_ONCE", tokens_at_once)
    assert len(check_vilt(vilt_folder, random_pixels(6), QUESTIONS)) > 2, "the answers must differ"


@pytest.mark.parametrize("folder", ["random", "starter"])
def test_logits_of_vilt_are_those_of_transformers(vilt_folder: Path, folder: str) -> None:
    path = STARTER / "vqa" if folder == "starter" else vilt_folder
    size = 64 if folder == "starter" else IMAGE_SIZE
    model = ViltForQuestionAnswering.from_pretrained(path).eval().requires_grad_(False)
    normalize = PixelNormalizer(Preprocessing(size, "bicubic", (0.5,) * 3, (0.5,) * 3), "cpu", torch.float32)
    ids = [[2, 9, 3], [2, 8, 9, 11, 12, 3], [2, 3], [2, 14, 10, 3], [2, 17, 3]]
    rows = [0, 0, 2, 1, 2]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(asked) for asked in ids], batch_first=True)
    pixels = random_pixels(3, size=size)
    with torch.inference_mode():
        tower = ViltTower(model, normalize, size)
        found = tower.logits(tower.embed(pixels), rows, ids)
        expected = model(input_ids=padded, attention_mask=padded > 0, pixel_values=normalize(pixels)[rows]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std(dim=0).max() > 0.1, "the pairs must differ"


def test_answers_that_can_hold_together_have_a_sigmoid_each(tmp_path: Path) -> None:
    folder = make_vilt(tmp_path)
    exclusive = load("vilt", folder).answer(random_pixels(2), [QUESTIONS] * 2)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"problem_type": "multi_label_classification"})
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), ViltImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        inputs = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
        image = processor(as_images(random_pixels(2)[1:]) * len(QUESTIONS), return_tensors="pt")
        expected = model(**inputs, pixel_values=image["pixel_values"]).logits.sigmoid().amax(dim=1)
    given = load("vilt", folder).answer(random_pixels(2), [QUESTIONS] * 2)
    np.testing.assert_allclose([answer.score for answer in given[1]], expected.numpy(), atol=1e-5)
    assert [[a.text for a in of] for of in given] == [[a.text for a in of] for of in exclusive]


@pytest.mark.parametrize("num_images", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_vilt_in_bfloat16_answers_what_float32_does(num_images: int) -> None:
    config = ModelConfig(family="vilt", path=str(STARTER / "vqa"))
    pixels = demo_pixels(64)[:num_images]
    questions = [["what color is the background?", "how many dogs are there?", "is there a cat?"]] * len(pixels)
    dtypes: tuple[Dtype, Dtype] = ("float32", "bfloat16")
    exact, half = (
        [answer for of in load_answerer(config, "cpu", dtype).answer(pixels, questions) for answer in of]
        for dtype in dtypes
    )
    num_allowed = max(1, len(exact) // 100)
    assert sum(one.text != other.text for one, other in zip(exact, half, strict=True)) <= num_allowed
    moved = np.abs([one.score - other.score for one, other in zip(exact, half, strict=True)])
    # As with BLIP's matching head; in transformers' bfloat16 three of a hundred are further off.
    assert (moved > 0.01).sum() <= num_allowed
    assert moved.max() <= 0.03


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


@pytest.mark.parametrize(
    ("family", "make", "words", "good", "bad"),
    [
        ("vilt", make_vilt, "word_embeddings.weight", "a red car", "two dogs and a dog"),
        ("blip_vqa", make_blip_vqa, "text_encoder.embeddings.word_embeddings.weight", "a red car", "a dog"),
        ("vlm", make_judge, "embed_tokens.weight", "a car", "a gun"),
    ],
)
def test_a_score_that_is_no_number_costs_its_image(
    family: str, make: object, words: str, good: str, bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    # Numbers too large for their layers pass it.
    monkeypatch.setattr(pretrained, "check_numbers", lambda *_, **__: None)
    weights = make(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    (name,) = [name for name in tensors if name.endswith(words)]
    word = AutoTokenizer.from_pretrained(tmp_path)(bad.split()[-1], add_special_tokens=False)["input_ids"]
    tensors[name][word] = math.nan
    save_file(tensors, weights, {"format": "pt"})
    request = PixelRequest(IMAGE_SIZE, "bicubic", ("squash",))
    pixels = [[image.permute(1, 2, 0).numpy().tobytes()] for image in random_pixels(3)]
    batch = pa.table({f"pixels_{request.key}": pixels, "questions": [[good], [good, bad], [good]]})
    columns, errors = run_contained(AnswerTask(load(family, tmp_path), request, []), batch, BatchLimit())
    assert [error and error["message"] for error in errors.to_pylist()] == [
        None,
        "ValueError: the model gave a score that is not finite",
        None,
    ]
    assert [row and 0 < row[0]["score"] <= 1 for row in columns["answers"].to_pylist()] == [True, None, True]


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


def test_the_profiles_tell_the_number_of_parameters_of_the_published_models() -> None:
    text = {"vocab_size": 30524, "hidden_size": 768, "num_attention_heads": 12, "encoder_hidden_size": 768}
    vision = {"image_size": 384, "hidden_size": 768, "intermediate_size": 3072, "patch_size": 16}
    with torch.device("meta"):  # shapes alone
        models = {
            "base": ViltForQuestionAnswering(ViltConfig(num_labels=3129)),
            "large": BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)),
        }
    for profile, model in models.items():
        assert sum(tensor.numel() for tensor in model.parameters()) == PROFILES[profile].models["answer"].num_parameters
