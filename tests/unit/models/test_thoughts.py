"""Models that think before they answer: a thought is no caption, no answer, and none of a judge's Yes or No."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models import CHAT_TEMPLATE, as_images, make_judge, random_pixels
from vlmflow.errors import AnswerError, WeightsError
from vlmflow.models import Answer
from vlmflow.models.judge import VlmJudge
from vlmflow.models.prompted import PromptedAnswerer, PromptedCaptioner
from vlmflow.models.thoughts import no_thought, without_thought
from vlmflow.models.vlm import TransformersChat, chat_inputs, chat_text

SWITCHED = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}the{% else %}<think>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("thinking"), chat=True)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a car", "a car"),
        ("<think>it is red</think>\n\na car", "\n\na car"),
        ("it is red</think>a car", "a car"),  # the prompt has begun the thought
        ("<think>\n\n</think><think>red</think>a car", "a car"),
        ("<think>it is", ""),
        ("[THINK]red[/THINK]a car", "a car"),
        ("◁think▷red◁/think▷a car", "a car"),
        ("<|channel>thought\nred<channel|>a car", "a car"),
        ("<think>red</think><answer><|begin_of_box|>a car<|end_of_box|></answer>", "a car"),
    ],
)
def test_what_is_said_begins_behind_the_thought(written: str, said: str) -> None:
    assert without_thought(written) == said


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHAT_TEMPLATE, {}),
        (SWITCHED, {"enable_thinking": False}),
        ({"default": "{% if thinking is defined and thinking %}<think>{% endif %}"}, {"thinking": False}),
        ("{{ message.thinking }}{{ message['thinking'] }}{{ message.reasoning }}", {}),
    ],
)
def test_a_chat_template_is_told_what_it_reads_and_nothing_else(template: object, options: dict[str, bool]) -> None:
    assert no_thought(template) == options


def test_a_model_that_may_think_is_asked_not_to(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = SWITCHED
    assert chat_text(processor, "a gun").endswith("a gunthe")


@pytest.mark.parametrize("num_beams", [1, 2])
def test_what_stands_behind_a_thought_is_the_text_and_what_is_scored(folder: Path, num_beams: int) -> None:
    """Where the marks are tokens that no text shows; some thoughts end, one does not, and some texts have none."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pixels, chat = random_pixels(8), TransformersChat.load(folder, "cpu")
    inputs = chat_inputs(processor, as_images(pixels), [chat_text(processor, "the car")] * 8)
    options = {"max_new_tokens": 7, "num_beams": num_beams, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **options, do_sample=False)
    beams = out.beam_indices if num_beams > 1 else None
    scores = model.compute_transition_scores(out.sequences, out.logits, beams, normalize_logits=True)
    rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    rows = [tokens[: tokens.index(2) + 1] if 2 in tokens else tokens for tokens in rows]
    begin, end = chat._thoughts._begins, chat._thoughts._ends = [rows[1][3]], [rows[0][2]]
    expected = []
    for tokens, logarithms in zip(rows, scores, strict=True):
        ended = max((place + 1 for place, token in enumerate(tokens) if token in end), default=0)
        begun = next((place for place, token in enumerate(tokens) if place >= ended and token in begin), None)
        text = processor.decode(tokens[ended:begun], skip_special_tokens=True)
        score = float(logarithms[ended : len(tokens)].sum().exp())
        expected.append((text if begun is None else f"{text}<think>", score))
    written = chat.write(pixels, ["the car"] * 8, 7, num_beams)
    assert [answer.text for answer in written] == [text for text, _ in expected]
    np.testing.assert_allclose([answer.score for answer in written], [score for _, score in expected], rtol=1e-3)
    plain = [processor.decode(tokens, skip_special_tokens=True) for tokens in rows]
    assert 1 < sum(text == was for (text, _), was in zip(expected, plain, strict=True)) < 8, "both kinds are there"


def test_a_thought_that_the_prompt_begins_goes_on_until_it_ends(folder: Path) -> None:
    chat, pixels = TransformersChat.load(folder, "cpu"), random_pixels(2)
    chat._processor.chat_template = CHAT_TEMPLATE + "<think>"
    (written,) = {answer.text for answer in chat.write(pixels, ["the car"] * 2, 5)}
    assert written == "<think>"
    with pytest.raises(AnswerError, match="still thinking at the last token"):
        PromptedCaptioner(chat, "the car").caption(pixels, 5)
    with pytest.raises(AnswerError, match="still thinking at the last token"):
        PromptedAnswerer(chat, "{question}", 5).answer(pixels, [["a gun"], ["the car"]])


class Says:
    """Writes these texts, whatever it is asked; as a server does."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def write(self, *_: object, **__: object) -> list[Answer]:
        return [Answer(text, 0.5) for text in self._texts]

    def take_usage(self) -> None:
        return None


def test_of_what_a_server_sends_the_thought_is_taken_off() -> None:
    pixels = random_pixels(2)
    captions = PromptedCaptioner(Says("<think>\nred\n</think>\n\na car", "a cat"), "a prompt").caption(pixels, 5)
    assert captions == ["a car", "a cat"]
    for nothing, told in (
        ("<think>red", "still thinking"),
        ("<think>red</think> ", "wrote nothing"),
        (" ", "wrote nothing"),
    ):
        with pytest.raises(AnswerError, match=told):
            PromptedCaptioner(Says(nothing, "a cat"), "a prompt").caption(pixels, 5)


def test_a_judge_that_thinks_first_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its first token is none of Yes and No, and every image would score something all the same."""
    thinking = copytree(folder, tmp_path / "thinking")
    template = thinking / "chat_template.jinja"
    template.write_text(SWITCHED, encoding="utf-8")
    assert np.isfinite(VlmJudge.load(thinking, ["a gun"], "cpu").score(random_pixels(1))).all()
    template.write_text(CHAT_TEMPLATE + "<think>\n", encoding="utf-8")
    with pytest.raises(WeightsError, match="has the model think first") as refused:
        VlmJudge.load(thinking, ["a gun"], "cpu")
    assert "Instruct" in refused.value.remedy
