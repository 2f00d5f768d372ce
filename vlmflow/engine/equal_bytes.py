"""Equal bytes are computed once: results are copied from the catalog, and shared between the images of an actor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog import KnownBytes, keys
from vlmflow.catalog.columns import flat
from vlmflow.catalog.masks import Mask, chosen, holds
from vlmflow.engine import columns
from vlmflow.imaging import ImageFacts
from vlmflow.tasks import Columns, Task

# The outputs of the tasks, of which a row has those that TASKS_COPIED names.
COPIED_TYPE = pa.struct([field for field in schema.WRITER_OPTIONAL if field.name != "verdict"])

_TASK_OF = {name: task for task, outputs in schema.TASK_OUTPUTS.items() for name in outputs.names}

_Identity: TypeAlias = tuple[str | tuple[str, ...] | None, ...]  # the bytes, and what else a task reads


@dataclass(frozen=True)
class Copy:
    """What is known of one image: its facts, and the tasks whose results need not be computed."""

    facts: ImageFacts
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Copies:
    """What the catalog holds for the images of a batch.

    Attributes:
        at: number of the row of ``rows`` for each image, (N,); -1: nothing is known of it.
        rows: as :meth:`KnownBytes.copies` gives them.
        tasks: per image.
    """

    at: npt.NDArray[np.int64]
    rows: pa.Table
    tasks: list[tuple[str, ...]]

    def of(self, row: int) -> Copy | None:
        """What is known of an image; None: nothing that is due."""
        if not self.tasks[row]:
            return None
        facts = self.rows.select(schema.FACTS.names).slice(int(self.at[row]), 1).to_pylist()[0]
        return Copy(ImageFacts(**facts), self.tasks[row])

    def column(self, wanted: Sequence[bool]) -> pa.Array:
        """The results of the images that are ``wanted``, as COPIED_TYPE; null elsewhere."""
        fields = [flat(self.rows[field.name]) for field in COPIED_TYPE]
        values = pa.StructArray.from_arrays(fields, fields=list(COPIED_TYPE))
        at = np.where(np.asarray(wanted), self.at, -1)
        return values.take(pa.array(at, mask=at < 0))

    def with_captions(self, batch: pa.Table) -> pa.Table:
        """Gives `match` the captions that are copied, where it runs itself because the caller's text is another."""
        index = batch.schema.get_field_index("previous_caption")
        copied = np.array(["caption" in tasks for tasks in self.tasks])
        theirs = flat(self.rows["caption"]).take(pa.array(np.where(copied, self.at, -1), mask=~copied))
        captions = pc.if_else(pa.array(copied), theirs, flat(batch["previous_caption"]))
        return batch.set_column(index, "previous_caption", captions)


def look_up(
    known: KnownBytes, batch: pa.Table, hashes: Sequence[str | None], run: Sequence[Sequence[str]]
) -> Copies | None:
    """Finds out which results of a batch the catalog holds already.

    Args:
        hashes: sha256 of each image; None where it was not read.
        run: the tasks due on each image.

    Returns:
        None: nothing is known.
    """
    wanted = [content_hash if tasks else None for content_hash, tasks in zip(hashes, run, strict=True)]
    found, rows = known.copies(wanted)
    if not found.any():
        return None
    at = np.where(found, np.cumsum(found) - 1, -1)
    # `match` is of two texts as much as of the image, `answer` of its questions.
    theirs = _columns(rows["text_digest"], rows["caption"], rows["questions_digest"])
    asked = keys.questions_digests(batch["questions"], known.questions)
    ours = _columns(keys.text_digests(batch["text"]), batch["previous_caption"], asked)
    tasks: list[tuple[str, ...]] = []
    for place, (text, caption, questions), due in zip(at.tolist(), ours, run, strict=True):
        if place < 0:
            tasks.append(())
            continue
        their_text, their_caption, their_questions = theirs[place]
        fits = {
            "match": their_text == text and ("caption" in due or their_caption == caption),
            "answer": their_questions == questions,
        }
        tasks.append(tuple(task for task in due if fits.get(task, True)))
    return Copies(at, rows, tasks)


def _columns(*columns: pa.Array | pa.ChunkedArray) -> list[tuple[str | None, ...]]:
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def put_copied(rows: pa.Table) -> pa.Table:
    """Puts copied results in their place, as if the tasks had run, in rows that are ready to be written."""
    if columns.COPIED not in rows.column_names:
        return rows
    copied = flat(rows[columns.COPIED])
    masks: dict[str, Mask] = {task: holds(rows[columns.TASKS_COPIED], task) for task in set(_TASK_OF.values())}
    for field in COPIED_TYPE:
        mask = masks[_TASK_OF[field.name]]
        index = rows.schema.get_field_index(field.name)
        if not mask.any():
            continue
        ours = pa.nulls(rows.num_rows, field.type) if index < 0 else flat(rows[field.name]).cast(field.type)
        values = chosen(mask, pc.struct_field(copied, field.name), ours)
        rows = rows.append_column(field, values) if index < 0 else rows.set_column(index, field, values)
    additions: list[list[object]] = [list(tasks) for tasks in rows[columns.TASKS_COPIED].to_pylist()]
    return columns.append_to_lists(rows.drop_columns([columns.COPIED]), columns.TASKS_RUN, additions)


class RecentResults:
    """What a task gave for the images that an actor worked on last, by what it reads. One per task and worker.

    Args:
        max_rows: how many results are kept.
    """

    def __init__(self, task: Task, max_rows: int = 1_024) -> None:
        self._max_rows = max_rows
        # A task that reads no pixels is cheap, and may read what is no key, such as vectors.
        self.is_used = any(name.startswith("pixels_") for name in task.reads)
        self._texts = [name for name in (*task.reads, "caption") if not name.startswith(("pixels_", "views_"))]
        self._kept = _Kept({field.name: pa.nulls(0, field.type) for field in task.writes}, {})
        self._lock = threading.Lock()

    def split(self, rows: pa.Table) -> Split:
        """Finds the rows that must be computed: the first of each that is not here yet."""
        names = ["content_hash", *(name for name in self._texts if name in rows.column_names)]
        values = [[tuple(v) if isinstance(v, list) else v for v in rows[name].to_pylist()] for name in names]
        identities = list(zip(*values, strict=True))
        places: dict[_Identity, int] = {}
        fresh: list[int] = []
        source = np.empty(len(identities), dtype=np.int64)
        kept = self._kept
        for row, identity in enumerate(identities):
            place = kept.places.get(identity)
            if place is not None:
                source[row] = place
                continue
            if identity not in places:
                places[identity] = len(kept.places) + len(fresh)
                fresh.append(row)
            source[row] = places[identity]
        return Split(fresh, source, [identities[row] for row in fresh], kept)

    def join(self, split: Split, values: Columns, errors: pa.Array) -> tuple[Columns, pa.Array]:
        """The results of all rows, from those of the fresh ones; results without an error are kept.

        Args:
            values: the task's columns for ``split.fresh``.
            errors: one of ``schema.ERROR`` for each of these, null where there is none.
        """
        source = pa.array(split.source)
        before = split.kept  # others may have been at it since
        joined = {name: pa.concat_arrays([kept, values[name]]).take(source) for name, kept in before.values.items()}
        joined_errors = pa.concat_arrays([pa.nulls(len(before.places), schema.ERROR), errors]).take(source)
        good = pa.array(np.flatnonzero(pc.is_null(errors)))
        found = {name: values[name].take(good) for name in before.values}
        with self._lock:
            self._kept = self._kept.and_these(
                found, [split.identities[row] for row in good.to_pylist()], self._max_rows
            )
        return joined, joined_errors


@dataclass(frozen=True)
class _Kept:
    """Results, each by what it was made of; never changed, so that a batch finds those that it was promised.

    Attributes:
        places: of the results among the values, in their order.
    """

    values: Columns
    places: dict[_Identity, int]

    def and_these(self, values: Columns, identities: Sequence[_Identity], max_rows: int) -> _Kept:
        """The last so many; of an identity that another batch has brought meanwhile the later one."""
        every = [*self.places, *identities]
        last = sorted({identity: place for place, identity in enumerate(every)}.values())[-max_rows:]
        rows = pa.array(last, pa.int64())
        both = {name: pa.concat_arrays([kept, values[name]]).take(rows) for name, kept in self.values.items()}
        return _Kept(both, {every[place]: new for new, place in enumerate(last)})


@dataclass(frozen=True)
class Split:
    """Rows to compute, and where each row's result is: among those kept, then the fresh ones.

    Attributes:
        fresh: numbers of the rows to compute.
        source: (N,) place of each row's result.
        identities: of the fresh rows.
        kept: the results that were there.
    """

    fresh: list[int]
    source: npt.NDArray[np.int64]
    identities: list[_Identity]
    kept: _Kept

    @property
    def shared(self) -> list[bool]:
        """Per row, whether its result is another's."""
        fresh = set(self.fresh)
        return [row not in fresh for row in range(len(self.source))]
