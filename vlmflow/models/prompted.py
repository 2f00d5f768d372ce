"""Captions and answers of models that are asked in words: what they have in common, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vlmflow.errors import AnswerError, QuestionError
from vlmflow.models import Answer, Usage
from vlmflow.models.prompts import QUESTION
from vlmflow.models.questions import check_paired

_MAX_QUESTION_CHARS = 2_000


class VisionChat(Protocol):
    """A model that writes about an image what a prompt asks for. N: images, S: side of the pixels."""

    def write(
        self,
        pixels: torch.Tensor,
        prompts: Sequence[str],
        max_tokens: int,
        num_beams: int = 1,
        *,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Writes what each prompt asks for of its image: at most ``max_tokens`` tokens, the most probable ones.

        Args:
            pixels: (N, 3, S, S) uint8 RGB.
            rows: of each prompt, the image that it is about; None: prompt i is about image i.
            num_beams: 1: the most probable token at every step; more: the best of so many texts, which vLLM and
                endpoints do not search for.
        """

    def take_usage(self) -> Usage | None:
        """What was spent since it was last asked; None: nothing is paid for."""


class PromptedCaptioner:
    """Asks for a caption with one prompt."""

    def __init__(self, chat: VisionChat, prompt: str) -> None:
        self._chat, self._prompt = chat, prompt

    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions, on one line each; see :class:`VisionChat` for the rest.

        Raises:
            AnswerError: one of them is empty.
        """
        if len(pixels) == 0:
            return []
        written = self._chat.write(pixels, [self._prompt] * len(pixels), max_tokens, num_beams)
        return [_on_one_line(answer).text for answer in written]

    def take_usage(self) -> Usage | None:
        """See :class:`VisionChat`."""
        return self._chat.take_usage()


class PromptedAnswerer:
    """Asks each question in a prompt of its own, with the image beside it."""

    def __init__(self, chat: VisionChat, prompt: str, max_tokens: int) -> None:
        self._chat, self._prompt, self._max_tokens = chat, prompt, max_tokens

    def check_questions(self, questions: Sequence[str]) -> None:
        """See :class:`vlmflow.models.Answerer`."""
        for question in questions:
            if len(question) > _MAX_QUESTION_CHARS:
                raise QuestionError(
                    f"question {question[:60]!r}... has {len(question):,} characters, at most {_MAX_QUESTION_CHARS:,}",
                    remedy="Ask a shorter question.",
                )

    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`.

        Raises:
            AnswerError: one of the answers is empty.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        flat = [question for asked in questions for question in asked]
        self.check_questions(flat)
        if not flat:
            return [[] for _ in questions]
        prompts = [self._prompt.replace(QUESTION, question) for question in flat]
        # An image is not copied for each of its questions: a batch of large ones would not fit many times.
        written = iter(self._chat.write(pixels, prompts, self._max_tokens, rows=rows))
        return [[_on_one_line(next(written)) for _ in asked] for asked in questions]

    def take_usage(self) -> Usage | None:
        """See :class:`VisionChat`."""
        return self._chat.take_usage()


def rows_of(pixels: torch.Tensor, prompts: Sequence[str], rows: Sequence[int] | None) -> list[int]:
    """The image of each prompt.

    Raises:
        ValueError: there is not one for each.
    """
    found = list(range(len(pixels)) if rows is None else rows)
    if len(found) != len(prompts):
        raise ValueError(f"{len(found)} images but {len(prompts)} prompts")
    return found


def _on_one_line(answer: Answer) -> Answer:
    text = " ".join(answer.text.split())
    if not text:
        raise AnswerError("the model wrote nothing")
    return Answer(text, answer.score)
