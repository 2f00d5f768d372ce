"""Questions on their way into a model, and the scores that come out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vlmflow.errors import QuestionError

_SHOWN_CHARS = 60


def check_paired(num_images: int, questions: Sequence[Sequence[str]]) -> None:
    """Makes sure that there is one list of questions for each image.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(questions) != num_images:
        raise ValueError(f"{num_images} images but {len(questions)} lists of questions")


def check_scores(scores: Sequence[float]) -> None:
    """Makes sure that the model gave numbers: an answer whose score is none would pass for one of a model without.

    Raises:
        ValueError: one is not finite.
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError("the model gave a score that is not finite")


def tokenize(tokenizer: Any, questions: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The tokens of each question, special ones included.

    Raises:
        QuestionError: one has more than ``max_tokens``.
    """
    if not questions:
        return []
    ids: list[list[int]] = tokenizer(list(questions), add_special_tokens=True)["input_ids"]
    for question, tokens in zip(questions, ids, strict=True):
        if len(tokens) > max_tokens:
            shown = question if len(question) <= _SHOWN_CHARS else f"{question[:_SHOWN_CHARS]}..."
            raise QuestionError(
                f"question {shown!r} has {len(tokens)} tokens, the model takes {max_tokens}",
                remedy="Ask a shorter question, or use another model.",
            )
    return ids
