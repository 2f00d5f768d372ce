"""Queues as CSV: no cell starts a formula, and nobody judges in the name of a list."""

from __future__ import annotations

import csv
import datetime as dt
from pathlib import Path

import pyarrow as pa
import pytest

from tests.hostile import HOSTILE
from vlmflow.errors import ReviewError
from vlmflow.moderation.queue import QUEUE
from vlmflow.moderation.review_files import read_words, write_queue


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@sum(1)", "|x", "\t=1", "\n=1", "＝1", HOSTILE["formula"]])
def test_no_cell_of_a_queue_starts_a_formula(tmp_path: Path, start: str) -> None:
    texts = {field.name: start for field in QUEUE if field.type == pa.string()}
    write_queue(tmp_path / "queue.csv", pa.Table.from_pylist([texts], schema=QUEUE))
    with (tmp_path / "queue.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    for name in texts:
        assert row[name] == f"'{start}", name


def test_nobody_judges_in_the_name_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    file.write_text(f"image_id,verdict,reviewer\n{'0' * 32},allow,list:banned\n")
    with pytest.raises(ReviewError, match="list of known images"):
        read_words(file, None, dt.datetime.now(dt.UTC))
