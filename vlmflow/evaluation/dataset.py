"""What is evaluated on: images with what is true of them, in one table whichever files it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from vlmflow.catalog.keys import digest_of
from vlmflow.errors import EvaluationError

EvaluationTask = Literal["retrieval", "caption", "answer", "zeroshot", "match", "moderate"]
TASKS: tuple[EvaluationTask, ...] = ("retrieval", "caption", "answer", "zeroshot", "match", "moderate")

QUESTION = pa.struct(
    [
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),  # what people answered
        ("question_type", pa.string()),
        ("answer_type", pa.string()),
    ]
)
URI = pa.field("uri", pa.string(), nullable=False)  # absolute

# One row per image; of match, one per pair of an image and a text.
SCHEMAS: dict[EvaluationTask, pa.Schema] = {
    "retrieval": pa.schema([URI, ("captions", pa.list_(pa.string()))]),
    "caption": pa.schema([URI, ("captions", pa.list_(pa.string()))]),
    "answer": pa.schema([URI, ("questions", pa.list_(QUESTION))]),
    "zeroshot": pa.schema([URI, ("class", pa.string())]),
    "match": pa.schema([URI, ("key", pa.string()), ("text", pa.string()), ("match", pa.bool_())]),
    # `labels`: those that are true of the image; null: only `flag` is known.
    "moderate": pa.schema([URI, ("labels", pa.list_(pa.string())), ("flag", pa.bool_())]),
}


@dataclass(frozen=True)
class Dataset:
    """Images and truth.

    Attributes:
        name: of the file or folder, for people.
        rows: with the task's columns in :data:`SCHEMAS`.
        benchmark: whose published figures compare, such as ``coco``; None: none is known.
        classes: of zeroshot, every class there is, in order; of the others, empty.
        image_ids: number of an image in the benchmark -> row, where its files number them (COCO).
    """

    task: EvaluationTask
    name: str
    rows: pa.Table
    benchmark: str | None = None
    classes: tuple[str, ...] = ()
    image_ids: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.rows.num_rows == 0:
            raise EvaluationError(f"{self.name} holds no image", remedy="Check the split, or --where.")

    def first(self, num: int | None) -> Dataset:
        """The first ``num`` rows; no published figure compares with a part.

        Of classes the first rows of each in turn: files sorted by class would show a few of them alone.
        """
        if num is None or num >= self.rows.num_rows:
            return self
        if self.classes:
            return replace(self, rows=self.rows.take(self._spread(num)), benchmark=None)
        ids = self.image_ids and {name: row for name, row in self.image_ids.items() if row < num}
        return replace(self, rows=self.rows.slice(0, num), benchmark=None, image_ids=ids)

    def _spread(self, num: int) -> list[int]:
        """Rows with as many of each class; which classes have one more, or any, follows from no order of theirs."""
        seen: Counter[str] = Counter()
        turns = []
        for row, name in enumerate(self.rows["class"].to_pylist()):
            turns.append((seen[name], digest_of(name), row))
            seen[name] += 1
        return sorted(row for *_, row in sorted(turns)[:num])


def table_of(task: EvaluationTask, columns: Mapping[str, Sequence[object]]) -> pa.Table:
    """Columns as a table with the task's schema."""
    return pa.table(dict(columns), schema=SCHEMAS[task])
