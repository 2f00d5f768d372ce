"""Vision-language models that are prompted, through transformers and through vLLM."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ray.data.llm import vLLMEngineProcessorConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models import make_judge, random_pixels, write_json
from vlmflow.config import Job, ModelConfig
from vlmflow.errors import ConfigError, QuestionError, WeightsError
from vlmflow.models import Answer, identify, load_answerer, load_captioner, pixel_request
from vlmflow.models.judge import VlmJudge
from vlmflow.models.prompted import PromptedAnswerer
from vlmflow.models.prompts import prompt_of
from vlmflow.models.vllm import VllmChat, engine_arguments
from vlmflow.models.vlm import TransformersChat, chat_text
from vlmflow.tasks.setup import prepare_tasks

PROMPTS = ["Does the picture show a gun", "the car", "a gun a car a gun a car the picture"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("vlm"))


def alone(
    folder: Path, image: torch.Tensor, prompt: str, max_tokens: int, end: int | None = None, num_beams: int = 1
) -> tuple[str, float, list[int]]:
    """As the library's documentation does it: one image, one prompt, no padding. Text, probability, tokens."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    inputs = processor(images=picture, text=chat_text(processor, prompt), return_tensors="pt")
    ends = {} if end is None else {"eos_token_id": end}
    with torch.inference_mode():
        out = model.eval().generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=num_beams,
            return_dict_in_generate=True,
            output_logits=True,
            **ends,
        )
    beams = out.beam_indices if num_beams > 1 else None
    scores = model.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.decode(tokens, skip_special_tokens=True).strip(), float(scores[0].sum().exp()), tokens


def test_a_batch_of_mixed_prompts_is_written_as_each_alone(folder: Path) -> None:
    pixels = random_pixels(6)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(6)]
    expected = [alone(folder, image, prompt, 7) for image, prompt in zip(pixels, prompts, strict=True)]
    written = TransformersChat.load(folder, "cpu").write(pixels, prompts, 7)
    assert [answer.text for answer in written] == [text for text, _, _ in expected]
    np.testing.assert_allclose([a.score for a in written], [score for _, score, _ in expected], rtol=1e-3)
    assert len({answer.text for answer in written}) > 2, "the texts must differ"


@pytest.mark.parametrize("end", [2, 4], ids=["none ends early", "one ends early"])
def test_beams_are_those_of_generate(folder: Path, end: int) -> None:
    pixels, prompts = random_pixels(6), PROMPTS * 2
    chat = TransformersChat.load(folder, "cpu")
    chat._ends = [end]
    expected = [alone(folder, image, prompt, 7, end, 3) for image, prompt in zip(pixels, prompts, strict=True)]
    written = chat.write(pixels, prompts, 7, 3)  # more than are written at once
    assert [answer.text for answer in written] == [text for text, _, _ in expected]
    np.testing.assert_allclose([a.score for a in written], [score for _, score, _ in expected], rtol=1e-3)
    assert {len(tokens) for _, _, tokens in expected} == ({7} if end == 2 else {5, 7})
    assert [answer.text for answer in chat.write(pixels, prompts, 7)] != [text for text, _, _ in expected]


def test_what_ends_early_is_cut_at_its_end_and_scored_up_to_it(folder: Path) -> None:
    image, tokens = max(
        ((image, alone(folder, image, PROMPTS[0], 7)[2]) for image in random_pixels(6)), key=lambda pair: len(pair[1])
    )
    end = tokens[len(tokens) // 2]
    text, score, cut = alone(folder, image, PROMPTS[0], 7, end)
    assert 0 < len(cut) < len(tokens)
    chat = TransformersChat.load(folder, "cpu")
    chat._ends = [end]
    first, second = chat.write(torch.stack([image, image]), PROMPTS[:2], 7)
    assert first.text == text
    assert first.score == pytest.approx(score, rel=1e-3)
    assert second.text == alone(folder, image, PROMPTS[1], 7, end)[0]


def test_images_are_not_copied_for_each_of_their_questions() -> None:
    pixels, seen = random_pixels(2), []

    class Chat:
        def write(self, pixels: torch.Tensor, prompts: Any, max_tokens: int, _: int, *, rows: Any) -> list[Answer]:
            seen.append((pixels.data_ptr(), len(pixels)))
            return [Answer(f"{row} {prompt}", 1.0) for row, prompt in zip(rows, prompts, strict=True)]

    given = PromptedAnswerer(Chat(), "{question}!", 7).answer(pixels, [["a", "b"], ["c"]])  # type: ignore[arg-type]
    assert [[answer.text for answer in answers] for answers in given] == [["0 a!", "0 b!"], ["1 c!"]]
    assert seen == [(pixels.data_ptr(), 2)]


def test_no_more_images_are_gathered_than_are_written_of_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, rows = random_pixels(3), [0] * 20 + [2]
    chat = TransformersChat.load(folder, "cpu")
    gathered = []
    whole = TransformersChat._write

    def count(chat: TransformersChat, images: list[Any], *arguments: Any) -> list[Answer]:
        gathered.append(len(images))
        return whole(chat, images, *arguments)

    monkeypatch.setattr(TransformersChat, "_write", count)
    first, *_, last = chat.write(pixels, [PROMPTS[0]] * 21, 3, rows=rows)
    assert gathered == [16, 5]
    expected = chat.write(pixels, [PROMPTS[0]] * 3, 3)
    assert [first.text, last.text] == [expected[0].text, expected[2].text]
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        chat.write(pixels, PROMPTS[:2], 3)


def test_it_captions_and_answers_through_the_roles(folder: Path) -> None:
    pixels = random_pixels(3)
    captioner = load_captioner(ModelConfig(family="vlm", path=str(folder), prompt="the picture"), "cpu")
    captions = captioner.caption(pixels, 5)
    assert captions == [alone(folder, image, "the picture", 5)[0] for image in pixels]
    assert captioner.caption(pixels[:0], 5) == []
    config = ModelConfig(family="vlm", path=str(folder), prompt="Does {question} Yes", max_answer_tokens=3)
    answerer = load_answerer(config, "cpu")
    given = answerer.answer(pixels, [["a gun", "the car"], [], ["a gun"]])
    assert [[answer.text for answer in answers] for answers in given] == [
        [alone(folder, pixels[0], f"Does {question} Yes", 3)[0] for question in ("a gun", "the car")],
        [],
        [alone(folder, pixels[2], "Does a gun Yes", 3)[0]],
    ]
    with pytest.raises(QuestionError, match="3,000 characters, at most 2,000"):
        answerer.check_questions(["x" * 3_000])


def test_a_question_that_holds_marks_of_the_model_is_refused(folder: Path) -> None:
    """It would tell the model of an image that is not there, or end the turn and begin another."""
    config = ModelConfig(family="vlm", path=str(folder), prompt="{question}", max_answer_tokens=3)
    answerer = load_answerer(config, "cpu")
    answerer.check_questions(["is it < a car > or </ s>, <b> or <unk>?"])
    for mark in ("<image>", "</s>", "<pad>"):
        with pytest.raises(QuestionError, match=f"question 'the {mark} car' holds {mark}, by which"):
            answerer.answer(random_pixels(2), [["the car"], [f"the {mark} car"]])


def test_the_chat_template_of_the_checkpoint_words_the_prompt(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert chat_text(processor, "the {braces}") == "[user]<image>the {braces}[assistant]"


def test_a_chat_template_that_begins_as_the_tokenizer_does_begins_once(tmp_path: Path) -> None:
    folder, pixels = make_judge(tmp_path, chat=True), random_pixels(2)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)

    def library(prompt: str) -> Any:
        """As transformers makes it of a conversation."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
        contents = [[{"type": "image", "image": picture}, {"type": "text", "text": prompt}] for picture in pictures]
        conversations = [[{"role": "user", "content": content}] for content in contents]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(conversations, add_generation_prompt=True, **options)

    with torch.inference_mode():
        logits = model(**library("the car Answer with one word, Yes or No.")).logits[:, -1, [5, 6]]
        written = model.generate(**library("the car"), max_new_tokens=5, do_sample=False)
    scores = VlmJudge.load(folder, ["the car"], "cpu").score(pixels)
    np.testing.assert_allclose(scores[:, 0], logits.softmax(-1)[:, 0].numpy(), atol=1e-5)
    texts = processor.batch_decode(written[:, library("the car")["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = TransformersChat.load(folder, "cpu").write(pixels, ["the car"] * 2, 5)
    assert [answer.text for answer in answers] == [text.strip() for text in texts]


def job(folder: Path, **model: Any) -> Job:
    role = model.pop("role", "answer")
    values = {"family": "vlm", "path": str(folder), **model}
    return Job.model_validate(
        {
            "source": {"uri": "in"},
            "catalog": {"uri": "out"},
            "profile": "base",
            "tasks": [role],
            "questions": ["what?"],
            "models": {role: values},
        }
    )


def test_the_prompt_decides_whether_rows_are_due(folder: Path) -> None:
    setup = prepare_tasks(job(folder))
    assert setup.prompts == {"answer": "{question} Answer with one word or a short phrase."}
    others = [{"prompt": "{question}!"}, {"max_answer_tokens": 5}]
    prints = [prepare_tasks(job(folder, **other)).fingerprints(("answer",))["answer"] for other in others]
    assert len({setup.fingerprints(("answer",))["answer"], *prints}) == 3
    first = prepare_tasks(job(folder, role="caption")).fingerprints(("caption",))
    assert first != prepare_tasks(job(folder, role="caption", prompt="the car")).fingerprints(("caption",))


@pytest.mark.parametrize(("role", "prompt", "what"), [("answer", "no place", "no"), ("caption", "{question}?", "a")])
def test_a_prompt_that_does_not_fit_its_role_stops_the_job(folder: Path, role: str, prompt: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"models\.{role}\.prompt has {what} {{question}}"):
        prepare_tasks(job(folder, role=role, prompt=prompt))


def test_what_the_processor_does_is_part_of_the_identity(tmp_path: Path) -> None:
    folder = make_judge(tmp_path)
    config = ModelConfig(family="vlm", path=str(folder))
    assert prompt_of("caption", config) == "Describe this image in one sentence."
    assert pixel_request("caption", config, ("squash",)).size == 32
    before = identify("caption", config).weights_digest
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert identify("caption", config).weights_digest != before


class FakeEngine:
    """Stands for vllm.LLM: remembers how it was made, and answers with the size of the image and the prompt."""

    made: dict[str, Any]

    def __init__(self, **arguments: Any) -> None:
        if arguments["model"].endswith("broken"):
            raise ValueError("no such architecture")
        FakeEngine.made = arguments

    def chat(
        self, conversations: Any, *, sampling_params: Any, chat_template_kwargs: dict[str, bool], use_tqdm: bool
    ) -> list[Any]:
        assert not use_tqdm
        assert chat_template_kwargs == {"enable_thinking": False, "thinking": False}
        assert sampling_params == {"temperature": 0.0, "max_tokens": 9, "logprobs": 1}
        outputs = []
        for ((message,),) in zip(conversations, strict=True):
            image, text = message["content"]
            assert (message["role"], image["type"], text["type"]) == ("user", "image_pil", "text")
            words = f" {image['image_pil'].getpixel((0, 0))[0]} {text['text']}\n"
            logarithm = None if text["text"] == "unscored" else math.log(0.25)
            completion = types.SimpleNamespace(text=words, cumulative_logprob=logarithm)
            outputs.append(types.SimpleNamespace(outputs=[completion]))
        return outputs


def test_vllm_is_given_images_and_prompts_and_gives_texts_and_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeEngine, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    pixels = random_pixels(2)
    captioner = load_captioner(ModelConfig(family="vllm", path=str(folder), prompt="unscored"), "cuda", "bfloat16")
    assert captioner.caption(pixels, 9) == [f"{int(image[0, 0, 0])} unscored" for image in pixels]
    assert FakeEngine.made == engine_arguments(folder, "bfloat16")
    answers = VllmChat.load(folder, "cuda").write(pixels, ["a", "unscored"], 9)
    assert answers[0].score == pytest.approx(0.25)
    reds = [int(image[0, 0, 0]) for image in pixels]
    texts = [answer.text for answer in VllmChat.load(folder, "cuda").write(pixels, ["a", "b", "c"], 9, rows=[1, 1, 0])]
    assert texts == [f"{reds[1]} a", f"{reds[1]} b", f"{reds[0]} c"]
    assert math.isnan(answers[1].score)
    with pytest.raises(WeightsError, match="as a model of vLLM on cuda: ValueError: no such architecture"):
        VllmChat.load(folder / "broken", "cuda")


def test_what_ends_a_text_is_part_of_the_identity(tmp_path: Path) -> None:
    """vLLM reads further tokens that end a text from this file, whatever the sampling says."""
    config = ModelConfig(family="vllm", path=str(make_judge(tmp_path)), prompt="a")
    before = identify("caption", config)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 2]})
    assert identify("caption", config).weights_digest != before.weights_digest


def test_the_engine_runs_no_code_and_loads_no_pickles(folder: Path) -> None:
    arguments = engine_arguments(folder, "auto")
    assert (arguments["load_format"], arguments["trust_remote_code"]) == ("safetensors", False)
    # Ray's own stage takes the very same arguments for the same engine.
    stage = vLLMEngineProcessorConfig(model_source=arguments.pop("model"), engine_kwargs=dict(arguments))
    assert stage.engine_kwargs == {**arguments, "task_type": "generate"}


def test_without_vllm_the_error_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the package vllm is not installed") as caught:
        load_captioner(ModelConfig(family="vllm", path=str(folder)), "cpu")
    assert "family vlm" in caught.value.remedy
