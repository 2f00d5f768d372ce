"""Answers to questions about each image: those of the job, and those that the caller has for the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from vlmflow import schema
from vlmflow.catalog.keys import asked_of
from vlmflow.imaging import PixelRequest
from vlmflow.models import Answer, Answerer, Metered
from vlmflow.tasks import Columns
from vlmflow.tasks.shown import shown, shown_column


class AnswerTask:
    """Asks about the whole image; a row without any question has an empty list of answers.

    Args:
        questions: asked of every image, before its own.

    Raises:
        QuestionError: the model cannot take one of them.
    """

    name = "answer"
    writes = pa.schema([("answers", pa.list_(schema.ANSWER))])

    def __init__(self, answerer: Answerer, request: PixelRequest | None, questions: Sequence[str]) -> None:
        answerer.check_questions(questions)
        self._answerer = answerer
        self.meter = answerer if isinstance(answerer, Metered) else None
        self._request = request
        self._questions = tuple(questions)
        self.reads: tuple[str, ...] = (shown_column(request), "questions")

    def __call__(self, batch: pa.Table) -> Columns:
        """The answers, in the order of the questions, null where the model wrote nothing; scores where it tells any.

        Raises:
            ValueError: the model gave something other than one answer for each question.
        """
        asked = [asked_of(self._questions, own) for own in batch["questions"].to_pylist()]
        given = self._answerer.answer(shown(batch, self._request), asked)
        if [len(answers) for answers in given] != [len(questions) for questions in asked]:
            raise ValueError("the model gave another number of answers than there are questions")
        if not all(
            isinstance(answer, Answer) and not math.isinf(answer.score) for answers in given for answer in answers
        ):
            raise ValueError("the model gave an answer that is none, or whose score is not finite")
        rows = [
            [_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
            for questions, answers in zip(asked, given, strict=True)
        ]
        return {"answers": pa.array(rows, pa.list_(schema.ANSWER))}


def _row(question: str, answer: Answer) -> dict[str, object]:
    score = None if math.isnan(answer.score) or not answer.text else answer.score
    return {"question": question, "answer": answer.text or None, "score": score}
