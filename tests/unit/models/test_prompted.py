"""What a model that is asked in words writes, and what it costs where that is nothing."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch

from vlmflow.errors import AnswerError
from vlmflow.models import Answer
from vlmflow.models.prompted import PromptedAnswerer, PromptedCaptioner
from vlmflow.tasks.answer import AnswerTask
from vlmflow.tasks.run import BatchLimit, run_contained


class Silent:
    """Writes nothing about dark images, nor where it is asked nothing; counts what it was asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def write(self, pixels: torch.Tensor, prompts: list[str], *_: Any, rows: Any = None) -> list[Answer]:
        shown = range(len(pixels)) if rows is None else rows
        self.num_asked += len(prompts)
        return [
            Answer("a \n car" if prompt and pixels[row].max() else " \n", 0.5)
            for row, prompt in zip(shown, prompts, strict=True)
        ]

    def take_usage(self) -> None:
        return None


def of_levels(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)


class CaptionLevels:
    name, reads, writes = "caption", (), pa.schema([("caption", pa.string())])

    def __init__(self, chat: Silent) -> None:
        self._captioner = PromptedCaptioner(chat, "a prompt")

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        return {"caption": pa.array(self._captioner.caption(of_levels(*batch["level"].to_pylist()), 5), pa.string())}


def test_what_writes_nothing_costs_its_row_and_no_second_look_at_the_others() -> None:
    chat = Silent()
    task = CaptionLevels(chat)
    columns, errors = run_contained(task, pa.table({"level": [9, 0, 9, 8, 7, 6, 5, 4]}), BatchLimit())
    assert columns["caption"].to_pylist() == ["a car", None, *["a car"] * 6]
    expected = {"stage": "caption", "class": "bad_answer", "message": "the model wrote nothing"}
    assert errors.to_pylist() == [None, expected, *[None] * 6]
    assert chat.num_asked == 8
    run_contained(task, pa.table({"level": [9, 3]}), BatchLimit())
    run_contained(task, pa.table({"level": [9, 3]}), BatchLimit())
    assert chat.num_asked == 12, "nothing is remembered from batch to batch"


def test_an_image_of_which_nothing_is_written_fails() -> None:
    with pytest.raises(AnswerError, match="the model wrote nothing"):
        PromptedAnswerer(Silent(), "{question}", 5).answer(of_levels(9, 0), [["what?"], ["what?", "who?"]])


def test_an_empty_answer_is_null_and_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.tasks.answer.shown", lambda batch, _: of_levels(*batch["level"].to_pylist()))
    task = AnswerTask(PromptedAnswerer(Silent(), "{question}", 5), None, ["what?"])
    batch = pa.table({"level": [9, 8], "questions": [[""], []]})
    monkeypatch.setattr("vlmflow.tasks.answer.asked_of", lambda asked, own: [*asked, *own])
    assert task(batch)["answers"].to_pylist() == [
        [{"question": "what?", "answer": "a car", "score": 0.5}, {"question": "", "answer": None, "score": None}],
        [{"question": "what?", "answer": "a car", "score": 0.5}],
    ]
