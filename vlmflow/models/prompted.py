"""Captions and answers of models that are asked in words: what they have in common, wherever they run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Protocol, TypeAlias

import torch

from vlmflow.errors import AnswerError, QuestionError
from vlmflow.models import Answer, Usage
from vlmflow.models.prompts import QUESTION
from vlmflow.models.questions import check_paired
from vlmflow.models.thoughts import ends_in_thought, without_thought

_MAX_QUESTION_CHARS = 2_000

_Key: TypeAlias = tuple[bytes, str, int, int]  # digest of the pixels, prompt, most tokens, beams


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


class _Writer:
    """Has texts written, on one line each, without the thought that may come before; some may be empty.

    A batch in which one is empty may be run again in halves, to find the image that is to blame: what was written is
    remembered until the next batch, so that these cost nothing.
    """

    def __init__(self, chat: VisionChat) -> None:
        self._chat = chat
        self._written: dict[_Key, Answer] = {}
        self._unfinished: set[_Key] = set()  # of these, those that end within a thought

    def write(
        self, pixels: torch.Tensor, prompts: Sequence[str], max_tokens: int, num_beams: int = 1, *, rows: Sequence[int]
    ) -> list[Answer]:
        if self._written:
            keys = _keys(pixels, prompts, max_tokens, num_beams, rows)
            if all(key in self._written for key in keys):
                return [self._written[key] for key in keys]
            self._written, self._unfinished = {}, set()
        written = self._chat.write(pixels, prompts, max_tokens, num_beams, rows=rows)
        answers = [Answer(" ".join(without_thought(answer.text).split()), answer.score) for answer in written]
        if not all(answer.text for answer in answers):
            keys = _keys(pixels, prompts, max_tokens, num_beams, rows)
            self._written = dict(zip(keys, answers, strict=True))
            self._unfinished = {key for key, answer in zip(keys, written, strict=True) if ends_in_thought(answer.text)}
        return answers

    def nothing(
        self, pixels: torch.Tensor, prompts: Sequence[str], max_tokens: int, num_beams: int = 1, *, rows: Sequence[int]
    ) -> AnswerError:
        """What to raise where texts that were just written are empty."""
        keys = _keys(pixels, prompts, max_tokens, num_beams, rows)
        if any(key in self._unfinished and not self._written[key].text for key in keys):
            return AnswerError("the model was still thinking at the last token that its text may have")
        return AnswerError("the model wrote nothing")


class PromptedCaptioner:
    """Asks for a caption with one prompt."""

    def __init__(self, chat: VisionChat, prompt: str) -> None:
        self._chat, self._prompt = chat, prompt
        self._writer = _Writer(chat)

    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions, on one line each; see :class:`VisionChat` for the rest.

        Raises:
            AnswerError: one of them is empty.
        """
        if len(pixels) == 0:
            return []
        prompts, rows = [self._prompt] * len(pixels), range(len(pixels))
        captions = [answer.text for answer in self._writer.write(pixels, prompts, max_tokens, num_beams, rows=rows)]
        if not all(captions):
            raise self._writer.nothing(pixels, prompts, max_tokens, num_beams, rows=rows)
        return captions

    def take_usage(self) -> Usage | None:
        """See :class:`VisionChat`."""
        return self._chat.take_usage()


class PromptedAnswerer:
    """Asks each question in a prompt of its own, with the image beside it."""

    def __init__(self, chat: VisionChat, prompt: str, max_tokens: int, *, marks: Collection[str] = ()) -> None:
        """``marks``: by which the model is told of images and turns; no question may hold one."""
        self._chat, self._prompt, self._max_tokens, self._marks = chat, prompt, max_tokens, marks
        self._writer = _Writer(chat)

    def check_questions(self, questions: Sequence[str]) -> None:
        """See :class:`vlmflow.models.Answerer`."""
        for question in questions:
            if len(question) > _MAX_QUESTION_CHARS:
                raise QuestionError(
                    f"question {question[:60]!r}... has {len(question):,} characters, at most {_MAX_QUESTION_CHARS:,}",
                    remedy="Ask a shorter question.",
                )
            for mark in self._marks:
                if mark in question:
                    raise QuestionError(
                        f"question {question[:60]!r} holds {mark}, by which the model is told of images and turns",
                        remedy="Ask in plain words.",
                    )

    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers each image's questions; see :class:`vlmflow.models.Answerer`. Some answers may be empty.

        Raises:
            AnswerError: all answers about an image are.
        """
        check_paired(len(pixels), questions)
        rows = [row for row, asked in enumerate(questions) for _ in asked]
        flat = [question for asked in questions for question in asked]
        self.check_questions(flat)
        if not flat:
            return [[] for _ in questions]
        prompts = [self._prompt.replace(QUESTION, question) for question in flat]
        # An image is not copied for each of its questions: a batch of large ones would not fit many times.
        written = iter(self._writer.write(pixels, prompts, self._max_tokens, rows=rows))
        answers = [[next(written) for _ in asked] for asked in questions]
        if any(given and not any(answer.text for answer in given) for given in answers):
            raise self._writer.nothing(pixels, prompts, self._max_tokens, rows=rows)
        return answers

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


def _keys(
    pixels: torch.Tensor, prompts: Sequence[str], max_tokens: int, num_beams: int, rows: Sequence[int]
) -> list[_Key]:
    digests = [hashlib.sha256(image.contiguous().cpu().numpy().data).digest() for image in pixels]
    return [(digests[row], prompt, max_tokens, num_beams) for row, prompt in zip(rows, prompts, strict=True)]
