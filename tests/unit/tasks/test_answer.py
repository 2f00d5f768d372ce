"""The task `answer`: which questions are asked of which image, and what becomes of the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pytest
import torch

from vlmflow.config import Job
from vlmflow.errors import ConfigError, QuestionError
from vlmflow.imaging import PixelRequest
from vlmflow.models import Answer
from vlmflow.tasks.answer import AnswerTask
from vlmflow.tasks.run import BatchLimit, run_contained

SIDE = 2
REQUEST = PixelRequest(SIDE, "bicubic", ("squash",))


class FakeAnswerer:
    """Answers with the first pixel of the image; knows no answer to `?`, and fails on long questions."""

    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        self.check_questions([question for asked in questions for question in asked])
        return [
            [Answer(f"{int(image[0, 0, 0])}", math.nan if question == "?" else 0.5) for question in asked]
            for image, asked in zip(pixels, questions, strict=True)
        ]

    def check_questions(self, questions: Sequence[str]) -> None:
        for question in questions:
            if len(question) > 10:
                raise QuestionError(f"question {question!r} is too long")


def batch(questions: list[list[str] | None]) -> pa.Table:
    pixels = [[bytes([row]) * (SIDE * SIDE * 3)] for row in range(len(questions))]
    return pa.table(
        {
            f"pixels_{REQUEST.key}": pa.array(pixels, pa.list_(pa.binary())),
            "questions": pa.array(questions, pa.list_(pa.string())),
        }
    )


def test_the_questions_of_the_job_come_first_and_none_is_asked_twice() -> None:
    task = AnswerTask(FakeAnswerer(), REQUEST, ["who", "what"])
    answers = task(batch([None, ["?", "who"], []]))["answers"].to_pylist()
    assert [[answer["question"] for answer in row] for row in answers] == [
        ["who", "what"],
        ["who", "what", "?"],
        ["who", "what"],
    ]
    assert answers[1] == [
        {"question": "who", "answer": "1", "score": 0.5},
        {"question": "what", "answer": "1", "score": 0.5},
        {"question": "?", "answer": "1", "score": None},
    ]


def test_an_image_without_a_question_has_an_empty_list() -> None:
    answers = AnswerTask(FakeAnswerer(), REQUEST, [])(batch([None, ["who"]]))["answers"]
    assert answers.null_count == 0
    assert [len(row) for row in answers.to_pylist()] == [0, 1]


def test_a_question_of_the_job_that_is_too_long_stops_it_before_any_image() -> None:
    with pytest.raises(QuestionError, match="too long"):
        AnswerTask(FakeAnswerer(), REQUEST, ["who", "a very long question"])


def test_a_question_of_one_image_that_is_too_long_costs_its_row() -> None:
    task = AnswerTask(FakeAnswerer(), REQUEST, ["who"])
    columns, errors = run_contained(task, batch([None, ["a very long question"], None, None]), BatchLimit())
    assert [row is None for row in columns["answers"].to_pylist()] == [False, True, False, False]
    (error,) = [error for error in errors.to_pylist() if error]
    assert error["message"] == "QuestionError: question 'a very long question' is too long"


def test_a_model_that_answers_less_than_it_was_asked_fails() -> None:
    class Terse(FakeAnswerer):
        def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
            return [answers[:1] for answers in super().answer(pixels, questions)]

    with pytest.raises(ValueError, match="another number of answers"):
        AnswerTask(Terse(), REQUEST, ["who", "what"])(batch([None]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, "answer has nothing to ask"), ({"questions": ["who", "  "]}, "one of the questions is blank")],
)
def test_a_job_that_asks_nothing_is_refused(changes: dict[str, object], reason: str) -> None:
    values = {"source": {"uri": "a"}, "catalog": {"uri": "b"}, "profile": "starter", "tasks": ["answer"]}
    with pytest.raises((ConfigError, ValueError), match=reason):
        Job.model_validate(values | changes)
    assert Job.model_validate(values | {"source": {"uri": "a", "questions_column": "q"}}).questions == ()
