"""What a row says: status, decision and provenance of a new row, and how a new result joins the live row.

Everything here is columns in, columns out; no file is opened. A *staged* row is a row of IMAGES as this run would
write it, with the columns of :data:`STAGED` behind it, which say what the run did.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform_column, flat
from vlmflow.catalog.keys import digest_of, text_digests
from vlmflow.errors import RowErrorClass

OK, PARTIAL, UNREADABLE, MISSING, FAILED = "ok", "partial", "unreadable", "missing", "failed"
STATUSES = (OK, PARTIAL, UNREADABLE, MISSING, FAILED)
REVIEW = "review"
UNSCORED = "unscored"  # decision_reason of a row without a moderation result

IMAGE_STAGES = ("read", "decode")  # an error there concerns the whole image, one of a task's only that task
UNREADABLE_CLASSES = (
    RowErrorClass.EMPTY_FILE,
    RowErrorClass.NOT_AN_IMAGE,
    RowErrorClass.UNSUPPORTED_FORMAT,
    RowErrorClass.TRUNCATED,
    RowErrorClass.CORRUPT,
    RowErrorClass.TOO_MANY_BYTES,
    RowErrorClass.TOO_MANY_PIXELS,
)

# Behind the columns of IMAGES in a staged file: what the commit needs to merge.
STAGED = pa.schema(
    [
        ("tasks_run", pa.list_(pa.string())),
        ("tasks_failed", pa.list_(pa.string())),
        ("live_file", pa.string()),
        ("previous_version", pa.string()),
    ]
)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RunConstants:
    """What is the same for every row that a run writes."""

    run_id: str
    tasks: tuple[str, ...]
    fingerprints: dict[str, str]  # per task; that of `moderate` leaves the policy out
    models: dict[str, str]  # embed, caption, match -> id@revision
    policy_name: str | None
    policy_version: str | None
    policy_digest: str | None
    decoder: str

    @property
    def attempt_digest(self) -> str:
        """Attempts are counted per object version and this digest of the fingerprints that they ran with."""
        return attempt_digest(self.fingerprints)


def attempt_digest(fingerprints: dict[str, str]) -> str:
    """One digest of the fingerprints of a run's tasks, whatever their order."""
    return digest_of(*(f"{task}={fingerprints[task]}" for task in sorted(fingerprints)))


def stage_rows(rows: pa.Table, constants: RunConstants, columns: pa.Schema) -> pa.Table:
    """Turns the pipeline's rows into rows of the images table, as they stand without a live row.

    Args:
        rows: REFERENCE, PLANNED, FACTS, OUTCOME and the tasks' outputs.
        columns: the schema of the images table.

    Returns:
        ``columns`` followed by :data:`STAGED`.
    """
    images = rows_of_image_errors(rows["errors"])
    run = {task: holds(rows["tasks_run"], task) for task in schema.TASKS}
    failed = {task: holds(rows["tasks_failed"], task) for task in schema.TASKS}
    any_run = np.logical_or.reduce(list(run.values()))
    any_failed = np.logical_or.reduce(list(failed.values()))
    filled: dict[str, pa.Array] = {
        "seen_version": rows["object_version"],
        "status": _status(images, any_run, any_failed),
        "attempts": pc.add(pc.fill_null(rows["attempts"], 0), 1),
        "attempt_digest": _constant(constants.attempt_digest, rows.num_rows),
        "decoder": _constant(constants.decoder, rows.num_rows),
        "run_id": _constant(constants.run_id, rows.num_rows),
        "updated_at": pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP), rows.num_rows),
    }
    for task in schema.TASKS:
        filled |= _task_columns(task, rows, constants, run[task])
    decision = conform_column(rows, schema.WRITER_OPTIONAL.field("decision"))
    reason = conform_column(rows, schema.WRITER_OPTIONAL.field("decision_reason"))
    scored = pa.array(run["moderate"] & is_valid(decision))
    filled["decision"] = pc.if_else(scored, decision, REVIEW)
    filled["decision_reason"] = pc.if_else(scored, reason, UNSCORED)
    out = []
    for field in columns:
        out.append(filled[field.name].cast(field.type) if field.name in filled else conform_column(rows, field))
    out += [conform_column(rows, field) for field in STAGED]
    return pa.table(out, schema=pa.schema([*columns, *STAGED]))


@dataclass(frozen=True)
class ImageErrors:
    """Per row: whether the whole image failed, and how. Each an (N,) mask."""

    missing: Mask
    unreadable: Mask
    failed: Mask

    @property
    def any(self) -> Mask:
        """The image was not read, or not decoded."""
        return self.missing | self.unreadable | self.failed


def rows_of_image_errors(errors: pa.ChunkedArray) -> ImageErrors:
    """Which rows carry an error of reading or decoding. ``errors``: a column of type ``schema.ERRORS``."""
    rows, items = _explode(errors)
    of_image = np.isin(_strings(items, "stage"), IMAGE_STAGES)
    classes = _strings(items, "class")
    missing, unreadable = classes == RowErrorClass.MISSING, np.isin(classes, [str(c) for c in UNREADABLE_CLASSES])

    def mark(which: Mask) -> Mask:
        marks = np.zeros(len(errors), dtype=np.bool_)
        marks[rows[of_image & which]] = True
        return marks

    # Of several errors the one that says least about the bytes decides: a failed read may hide a good image.
    failed = mark(~missing & ~unreadable)
    missing = mark(missing) & ~failed
    return ImageErrors(missing, mark(unreadable) & ~failed & ~missing, failed)


def merge(live: pa.Table, staged: pa.Table) -> tuple[pa.Table, Mask]:
    """Joins what a run found out about images with their live rows.

    Args:
        live: rows of the images table.
        staged: as :func:`stage_rows` gives them; row i is about the image of live row i.

    Returns:
        The rows to write in place of ``live``, with its schema, and a mask of those where the staged row was left
        out because another run has met a newer version of the object.
    """
    count = live.num_rows
    verdict = _Verdict.of(live, staged)
    keep, ours = np.arange(count), np.arange(count) + count
    none = np.full(count, -1)
    take = _Taker(live, staged)

    facts = np.where(verdict.ours, ours, keep)
    columns: dict[str, pa.Array] = {}
    for name in ("object_version", "size_bytes", *schema.FACTS.names):
        columns[name] = take(name, facts)
    for task, parts in schema.TASK_COLUMNS.items():
        by_task = np.where(verdict.run[task], ours, np.where(verdict.kept[task], keep, none))
        for name in (*parts.names, schema.fingerprint_column(task)):
            columns[name] = take(name, by_task)
    columns |= _moderation(live, staged, verdict, columns)

    # The marks of this attempt: taken from us unless a newer version was met.
    marks = np.where(verdict.superseded, keep, ours)
    for name in ("decoder", "run_id", "updated_at", "attempt_digest", "source"):
        if name in live.column_names:
            columns[name] = take(name, marks)
    seen = take("seen_version", marks)
    columns["seen_version"] = pc.if_else(pc.is_null(seen), live["seen_version"], seen)
    columns["errors"] = _merged_errors(live, staged, verdict)
    columns["status"] = _merged_status(live, verdict, columns)
    columns["attempts"] = _attempts(live, staged, verdict)
    merged = [
        columns[field.name].cast(field.type) if field.name in columns else live[field.name] for field in live.schema
    ]
    return pa.table(merged, schema=live.schema), verdict.superseded


@dataclass(frozen=True)
class _Verdict:
    """Per row: what of the staged row counts. Each an (N,) mask, or one per task."""

    superseded: Mask  # another run met a newer version: nothing of ours counts
    ours: Mask  # facts and version are ours: we read the image, or there was nothing good to keep
    image: ImageErrors  # of ours, superseded rows left out
    marked: Mask  # our image failed, and a good row stays under the mark
    same: Mask  # equal bytes
    run: dict[str, Mask]  # the task's columns are ours
    kept: dict[str, Mask]  # the task's columns are the live row's
    failed: dict[str, Mask]  # the task failed, in this attempt or in the last one that tried it on these bytes

    @classmethod
    def of(cls, live: pa.Table, staged: pa.Table) -> _Verdict:
        superseded = _superseded(live, staged)
        found = rows_of_image_errors(staged["errors"])
        counts = ~superseded
        image = ImageErrors(found.missing & counts, found.unreadable & counts, found.failed & counts)
        held = {task: is_valid(live[schema.fingerprint_column(task)]) for task in schema.TASKS}
        held["moderate"] = held["moderate"] | is_valid(live["labels"])
        good = np.logical_or.reduce(list(held.values()))
        marked = image.any & good
        ours = counts & ~marked
        same = equal(live["content_hash"], staged["content_hash"])
        run = {task: ours & holds(staged["tasks_run"], task) for task in schema.TASKS}
        kept = {task: (~ours | same) & ~run[task] for task in schema.TASKS}
        # A match of the old caption says nothing of the new one.
        recaptioned = run["caption"] & ~equal(live["caption"], staged["caption"])
        kept["match"] = kept["match"] & ~recaptioned
        before = failed_tasks(live["errors"])
        failed = {
            task: (ours & holds(staged["tasks_failed"], task))
            | (before[task] & (~ours | same) & ~run[task] & ~(ours & holds(staged["tasks_failed"], task)))
            for task in schema.TASKS
        }
        return cls(superseded, ours, image, marked, same, run, kept, failed)


def _superseded(live: pa.Table, staged: pa.Table) -> Mask:
    """Rows whose live row has moved, since planning, to a version that was met later than ours."""
    moved = ~_same(live["seen_version"], staged["previous_version"])
    other = ~_same(live["seen_version"], staged["seen_version"])
    later = pc.fill_null(pc.greater(live["updated_at"], staged["updated_at"]), False)
    return moved & other & _mask(later)


def _moderation(
    live: pa.Table, staged: pa.Table, verdict: _Verdict, merged: dict[str, pa.Array]
) -> dict[str, pa.Array]:
    """Decision, its reason and the previous policy; a decision that rests on nothing is `review`."""
    run = pa.array(verdict.run["moderate"])
    previous = pc.if_else(
        pc.fill_null(pc.equal(live["policy_digest"], staged["policy_digest"]), True),
        live["previous_policy"],
        live["policy_digest"],
    )
    # Of other bytes: the new ones are scored for the first time.
    previous = pc.if_else(pa.array(verdict.same), previous, pa.scalar(None, pa.string()))
    # What was scored may no longer be what is there, or could not be scored again: a person decides. Only an
    # object that is gone keeps its decision.
    doubtful = (verdict.marked & ~verdict.image.missing) | (verdict.ours & verdict.failed["moderate"])
    stands = verdict.kept["moderate"] & is_valid(merged["labels"]) & ~doubtful
    stands |= verdict.superseded | (verdict.marked & verdict.image.missing)
    reason = np.where(verdict.marked & verdict.image.unreadable, UNREADABLE, UNSCORED)
    reason = np.where(verdict.marked & verdict.image.failed, FAILED, reason)
    no_fingerprint = pa.array(doubtful & ~verdict.run["moderate"])
    fingerprint = schema.fingerprint_column("moderate")
    return {
        "previous_policy": pc.if_else(run, previous, merged["previous_policy"]),
        "decision": pc.if_else(run, staged["decision"], pc.if_else(pa.array(stands), live["decision"], REVIEW)),
        "decision_reason": pc.if_else(
            run, staged["decision_reason"], pc.if_else(pa.array(stands), live["decision_reason"], pa.array(reason))
        ),
        # Without its fingerprint moderation is due again, and the decision comes back with the image.
        fingerprint: pc.if_else(no_fingerprint, pa.scalar(None, pa.string()), merged[fingerprint]),
    }


def _merged_errors(live: pa.Table, staged: pa.Table, verdict: _Verdict) -> pa.Array:
    """Our errors, and the live ones of tasks that still stand as failed."""
    live_rows, live_items = _explode(live["errors"])
    our_rows, our_items = _explode(staged["errors"])
    stages = _strings(live_items, "stage")
    keep = verdict.superseded[live_rows].copy()
    for task in schema.TASKS:
        ours = verdict.ours & holds(staged["tasks_failed"], task)
        keep |= (stages == task) & (verdict.failed[task] & ~ours)[live_rows]
    take = ~verdict.superseded[our_rows]
    rows = np.concatenate([live_rows[keep], our_rows[take]])
    items = pa.concat_arrays([live_items.filter(pa.array(keep)), our_items.filter(pa.array(take))])
    order = np.argsort(rows, kind="stable")
    offsets = np.searchsorted(rows[order], np.arange(live.num_rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), items.take(pa.array(order)), type=schema.ERRORS)


def _merged_status(live: pa.Table, verdict: _Verdict, merged: dict[str, pa.Array]) -> pa.Array:
    valued = np.logical_or.reduce([is_valid(merged[schema.fingerprint_column(task)]) for task in schema.TASKS])
    any_failed = np.logical_or.reduce([verdict.failed[task] for task in schema.TASKS])
    status = _status(verdict.image, valued, any_failed)
    return pc.if_else(pa.array(verdict.superseded), live["status"], status)


def _attempts(live: pa.Table, staged: pa.Table, verdict: _Verdict) -> pa.Array:
    """Attempts at this version and these fingerprints, ours included."""
    version = pc.fill_null(staged["seen_version"], live["seen_version"])
    again = _same(live["seen_version"], version) & equal(live["attempt_digest"], staged["attempt_digest"])
    again &= ~_mask(pc.equal(live["status"], OK))
    before = pc.if_else(pa.array(again), pc.fill_null(live["attempts"], 0), 0)
    return pc.if_else(pa.array(verdict.superseded), live["attempts"], pc.add(before, 1))


def _status(image: ImageErrors, any_values: Mask, any_failed: Mask) -> pa.Array:
    status = np.where(any_failed, np.where(any_values, PARTIAL, FAILED), OK)
    status = np.where(image.failed, FAILED, status)
    status = np.where(image.unreadable, UNREADABLE, status)
    return pa.array(np.where(image.missing, MISSING, status), pa.string())


def _task_columns(task: str, rows: pa.Table, constants: RunConstants, run: Mask) -> dict[str, pa.Array]:
    """The task's columns and fingerprint; null in rows where it did not run."""
    given: dict[str, str | None] = {
        "embed_run_id": constants.run_id,
        "policy_name": constants.policy_name,
        "policy_version": constants.policy_version,
        "policy_digest": constants.policy_digest,
        "previous_policy": None,
        f"{task}_model": constants.models.get(task),
        schema.fingerprint_column(task): constants.fingerprints.get(task),
    }
    mask = pa.array(run)
    out: dict[str, pa.Array] = {}
    fingerprint = pa.field(schema.fingerprint_column(task), pa.string())
    for field in [*schema.TASK_COLUMNS[task], fingerprint]:
        if field.name == "text_digest":
            value = text_digests(rows["text"])
        elif field.name in given:
            value = _constant(given[field.name], rows.num_rows)
        else:
            value = conform_column(rows, field)
        out[field.name] = pc.if_else(mask, value, pa.scalar(None, field.type))
    return out


class _Taker:
    """Picks values out of the live rows (0 to N-1), the staged rows (N to 2N-1), or none of them (-1)."""

    def __init__(self, live: pa.Table, staged: pa.Table) -> None:
        self._live, self._staged = live, staged

    def __call__(self, name: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        theirs = conform_column(self._staged, self._live.schema.field(name))
        both = pa.concat_arrays([flat(self._live[name]), flat(theirs)])
        return both.take(pa.array(rows, mask=rows < 0))


def failed_tasks(errors: pa.ChunkedArray) -> dict[str, Mask]:
    """Per task, the rows whose errors say that it failed."""
    rows, items = _explode(errors)
    stages = _strings(items, "stage")
    out = {task: np.zeros(len(errors), dtype=np.bool_) for task in schema.TASKS}
    for task, marks in out.items():
        marks[rows[stages == task]] = True
    return out


def _explode(lists: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The items of all lists, each with the number of its row."""
    whole = flat(lists)
    return pc.list_parent_indices(whole).to_numpy(zero_copy_only=False).astype(np.int64), pc.list_flatten(whole)


def _strings(items: pa.Array, field: str) -> npt.NDArray[np.object_]:
    return np.asarray(pc.struct_field(items, field).to_pylist(), dtype=object)


def holds(lists: pa.ChunkedArray, value: str) -> Mask:
    """Rows whose list holds ``value``."""
    rows, items = _explode(lists)
    marks = np.zeros(len(lists), dtype=np.bool_)
    marks[rows[_mask(pc.fill_null(pc.equal(items, value), False))]] = True
    return marks


def _constant(value: str | None, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count)


def _mask(values: pa.Array | pa.ChunkedArray) -> Mask:
    return np.asarray(
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy(), bool
    )


def is_valid(values: pa.Array | pa.ChunkedArray) -> Mask:
    """Rows that are not null."""
    return _mask(pc.is_valid(values))


def equal(left: pa.Array | pa.ChunkedArray, right: pa.Array | pa.ChunkedArray | str) -> Mask:
    """Both known and equal."""
    return _mask(pc.fill_null(pc.equal(left, right), False))


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Mask:
    """Equal, or both null."""
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return equal(left, right) | _mask(both_null)
