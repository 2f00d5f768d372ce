"""What a model gives that is not what was asked for: each image keeps its row, with an error and without a value."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from vlmflow.imaging import PixelRequest
from vlmflow.models import Answer, EncodedImages
from vlmflow.tasks import Task
from vlmflow.tasks.answer import AnswerTask
from vlmflow.tasks.caption import CaptionTask
from vlmflow.tasks.embed import EmbedTask
from vlmflow.tasks.match import MatchTask
from vlmflow.tasks.run import BatchLimit, run_contained

REQUEST = PixelRequest(4, "bicubic", ("squash",))
NUM = 3


def batch() -> pa.Table:
    return pa.table(
        {
            "pixels_4_bicubic": pa.array([[bytes(48)]] * NUM, pa.list_(pa.binary())),
            "views_4_bicubic": pa.array([["squash"]] * NUM, pa.list_(pa.string())),
            "questions": pa.array([None] * NUM, pa.list_(pa.string())),
            "previous_caption": pa.array(["a cat"] * NUM),
            "text": pa.array([None] * NUM, pa.string()),
        }
    )


def captioning(give: Callable[[int], Any]) -> Task:
    return CaptionTask(SimpleNamespace(caption=lambda pixels, *_: give(len(pixels))), REQUEST, 8)  # type: ignore[arg-type]


def embedding(give: Callable[[int], Any]) -> Task:
    return EmbedTask(SimpleNamespace(dim=2, embed_images=lambda pixels: give(len(pixels))), REQUEST)  # type: ignore[arg-type]


def matching(give: Callable[[int], Any], encode: Callable[[int], int] = lambda num: num) -> Task:
    matcher = SimpleNamespace(
        encode_images=lambda pixels: EncodedImages(torch.zeros(encode(len(pixels)), 2)),
        match_itm=lambda images, texts: give(len(texts)),
        match_itc=lambda images, texts: None,
    )
    return MatchTask(matcher, REQUEST)  # type: ignore[arg-type]


def answering(give: Callable[[int], Any]) -> Task:
    answerer = SimpleNamespace(check_questions=lambda _: None, answer=lambda pixels, _: give(len(pixels)))
    return AnswerTask(answerer, REQUEST, ["who"])  # type: ignore[arg-type]


def unit(num: int, dim: int = 2) -> Any:
    return np.eye(1, dim, dtype=np.float32).repeat(num, 0)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (captioning(lambda num: ["a"] * (num + 1)), "the model gave 2 captions of 1 images"),
        (captioning(lambda num: []), "the model gave 0 captions of 1 images"),
        (captioning(lambda num: "abc"), "captions that are no list of texts"),
        (captioning(lambda num: [None] * num), "captions that are no list of texts"),
        (captioning(lambda num: [b"a"] * num), "captions that are no list of texts"),
        (captioning(lambda num: None), "TypeError"),
        (embedding(lambda num: unit(num + 1)), "vectors of shape (2, 2) (float32), not (1, 2)"),
        (embedding(lambda num: unit(0)), "vectors of shape (0, 2)"),
        (embedding(lambda num: unit(num, 3)), "vectors of shape (1, 3) (float32), not (1, 2)"),
        (embedding(lambda num: unit(num)[0]), "vectors of shape (2,)"),
        (embedding(lambda num: unit(num).astype(np.float64)), "(float64), not (1, 2) (float32)"),
        (embedding(lambda num: torch.from_numpy(unit(num))), "(Tensor), not"),
        (embedding(lambda num: unit(num) * 3), "a vector of length 3, not 1"),
        (embedding(lambda num: unit(num) * np.float32("nan")), "not finite"),
        (matching(lambda num: np.float32(0.5)), "scores of shape () for 1 pairs"),
        (matching(lambda num: np.full((num, 2), 0.5)), "scores of shape (1, 2) for 1 pairs"),
        (matching(lambda num: np.full(num + 1, 0.5)), "scores of shape (2,) for 1 pairs"),
        (matching(lambda num: np.full(num, np.inf)), "not finite"),
        (matching(lambda num: np.full(num, 0.5), lambda num: num + 1), "2 encoded images of 1"),
        (answering(lambda num: [[Answer("a", 0.5)]] * (num + 1)), "another number of answers"),
        (answering(lambda num: [[]] * num), "another number of answers"),
        (answering(lambda num: [["a"]] * num), "an answer that is none"),
        (answering(lambda num: [[Answer("a", float("inf"))]] * num), "not finite"),
    ],
)
def test_each_image_keeps_its_row(task: Task, told: str) -> None:
    columns, errors = run_contained(task, batch(), BatchLimit())
    assert [error["class"] for error in errors.to_pylist()] == ["task_failed"] * NUM
    assert all(told in error["message"] for error in errors.to_pylist())
    assert all(values.null_count == NUM for values in columns.values())


def test_one_score_for_a_whole_batch_is_not_taken_for_that_of_each() -> None:
    columns, errors = run_contained(matching(lambda num: np.full(1, 0.5)), batch(), BatchLimit())
    assert errors.null_count == NUM, "one at a time the model does give one for each"
    assert columns["caption_itm"].to_pylist() == [0.5] * NUM
