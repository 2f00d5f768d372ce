"""The few rows that the page shows, of a table that may hold millions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.search.results import Hit
from vlmflow.search.titles import scored_column

COLUMNS = (
    "image_id", "uri", "key", "status", "errors", "decision", "decision_reason", "caption", "width", "height", "format",
    "content_hash", "ingest_date", "object_version", "caption_itm", "caption_itc", "text_itm", "text_itc",
    "text_digest", "labels", "run_id", "answers", "alt_text", "alt_text_rule",
)  # fmt: skip


@dataclass(frozen=True)
class RowLabel:
    """A label of a row; ``value``: what the thresholds were compared with, the probability or else the score."""

    name: str
    value: float | None
    decision: str


@dataclass
class Row:
    """A row as the page shows it.

    Attributes:
        title: the caller's text that `match` scored; None: there was none, or no column holds it any more.
        labels: the flagged ones, the highest first.
        errors: a line for each.
        answers: question and answer, a line for each.
        alt_text: with the rule that it breaks behind it, if there is one.
        sets: why the row is on the page: ``new``, ``lowest``, ``label``, ``duplicate``, ``failed``, ``sample``.
    """

    hit: Hit
    caption_itm: float | None
    caption_itc: float | None
    text_itm: float | None
    text_itc: float | None
    title: str | None
    labels: tuple[RowLabel, ...]
    errors: tuple[str, ...]
    answers: tuple[str, ...] = ()
    alt_text: str | None = None
    sets: set[str] = field(default_factory=set)


class Pick:
    """The first ``count`` rows by a sort key, of any number of tables.

    Args:
        keys: columns with ``ascending`` or ``descending``. Last comes the id: it is a hash, so that the least ids are
            a uniform sample that stays the same from page to page.
    """

    def __init__(self, count: int, *keys: tuple[str, str]) -> None:
        self._count = count
        self._keys = [*keys, ("image_id", "ascending")]
        self._kept: pa.Table | None = None
        self.num_seen = 0

    def add(self, rows: pa.Table) -> None:
        """Looks at some rows, and keeps those that are among the first."""
        self.num_seen += rows.num_rows
        if self._kept is not None:
            rows = pa.concat_tables([self._kept, rows])
        if not rows.num_rows:  # of which Arrow 25 and earlier select nothing but an error
            self._kept = rows
            return
        order = pc.select_k_unstable(rows, k=min(self._count, rows.num_rows), sort_keys=self._keys)
        self._kept = rows.take(order)

    @property
    def rows(self) -> pa.Table | None:
        """What was kept, in order; None: nothing was looked at."""
        return self._kept


def as_row(values: Mapping[str, Any], texts: Sequence[str]) -> Row:
    """A row of the images table.

    Args:
        texts: the caller's columns of text.
    """
    column = scored_column(values, list(texts))
    hit = {name: values[name] for name in Hit.model_fields if name in values}
    labels = [
        RowLabel(label_name(label), label_value(label), label["decision"] or "review")
        for label in values["labels"] or ()
        if label["decision"] != "allow"
    ]
    return Row(
        hit=Hit(**hit | {"rank": 0, "score": 0.0, "ingest_date": str(values["ingest_date"])}),
        caption_itm=values["caption_itm"],
        caption_itc=values["caption_itc"],
        text_itm=values["text_itm"],
        text_itc=values["text_itc"],
        title=None if column is None else values["source"][column],
        labels=tuple(sorted(labels, key=lambda label: -(label.value or 0.0))),
        errors=tuple(
            f"{error['stage'] or ''}: {error['class'] or ''} - {error['message'] or ''}"
            for error in values["errors"] or ()
        ),
        answers=tuple(f"{answer['question']} {answer['answer'] or '-'}" for answer in values["answers"] or ()),
        alt_text=_alt_text(values),
    )


def _alt_text(values: Mapping[str, Any]) -> str | None:
    rule = values["alt_text_rule"]
    return values["alt_text"] if rule is None else f"{values['alt_text'] or '-'} (breaks the rule {rule})"


def label_name(label: Mapping[str, Any]) -> str:
    """``category/label``."""
    return f"{label['category'] or ''}/{label['label'] or ''}"


def label_value(label: Mapping[str, Any]) -> float | None:
    """What thresholds are compared with."""
    value = label["score"] if label["probability"] is None else label["probability"]
    return None if value is None else float(value)
