"""How a new result joins the live row of its image. Columns in, columns out; no file is opened."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform_column, flat, member
from vlmflow.catalog.judged import BY_VERDICT, by_model, of_list, with_verdicts
from vlmflow.catalog.masks import Mask, as_mask, chosen, equal, explode, field_strings, holds, is_valid, same_or_null
from vlmflow.catalog.rows import (
    FAILED,
    OK,
    REVIEW,
    STAGED,
    UNREADABLE,
    UNSCORED,
    ImageErrors,
    failed_tasks,
    restated,
    rows_of_image_errors,
    status_of,
    unseen_frames,
)


def merge(live: pa.Table, staged: pa.Table) -> tuple[pa.Table, Mask]:
    """Joins what a run found out about images with their live rows.

    Args:
        live: rows of the images table.
        staged: as :func:`stage_rows` gives them; row i is about the image of live row i.

    Returns:
        The rows to write in place of ``live``, with its schema, and a mask of those where the staged row was left
        out because another run has met a newer version of the object.
    """
    decided, listed = live, flat(staged["verdict"])
    live, staged = by_model(live), by_model(staged)
    verdict = _Verdict.of(live, staged)
    take = _Taker(live, staged)
    keep, ours, none = take.live_rows, take.staged_rows, take.no_rows

    facts = np.where(verdict.ours, ours, keep)
    columns: dict[str, pa.Array] = {}
    for name in ("object_version", "http_validator", "size_bytes", *schema.FACTS.names):
        columns[name] = take(name, facts)
    # A run that shows no model the frames of a clip finds no hash where one that does so has found one.
    columns["phash"] = take("phash", np.where(verdict.same & ~is_valid(staged["phash"]), keep, facts))
    for task, parts in schema.TASK_COLUMNS.items():
        by_task = np.where(verdict.run[task], ours, np.where(verdict.kept[task], keep, none))
        for name in (*parts.names, schema.fingerprint_column(task)):
            columns[name] = take(name, by_task)
    columns |= _moderation(live, staged, verdict, columns)
    columns |= _judged(decided, listed, verdict, columns)

    # The marks of this attempt: taken from us unless a newer version was met.
    marks = np.where(verdict.superseded, keep, ours)
    for name in ("decoder", "run_id", "read_at", "attempt_digest"):
        columns[name] = take(name, marks)
    # Not when we staged ours: others may have written the row since, and readers go by this time.
    now = pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP)
    columns["updated_at"] = pc.if_else(pa.array(verdict.superseded), flat(live["updated_at"]), now)
    if "source" in live.column_names:
        columns["source"] = _source(live, staged, verdict)
    columns |= _alt_texts(live, staged, verdict, columns)
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
        # Another run may have captioned the image since planning: a match of what it said before is due again.
        caption = pc.if_else(pa.array(same), flat(live["caption"]), pa.scalar(None, pa.string()))
        outrun = run["match"] & ~run["caption"] & ~same_or_null(caption, flat(staged["matched_caption"]))
        run["match"] = run["match"] & ~outrun
        kept = {task: (~ours | same) & ~run[task] for task in schema.TASKS}
        kept["match"] = kept["match"] & ~outrun
        # A match of the old caption says nothing of the new one.
        recaptioned = run["caption"] & ~equal(live["caption"], staged["caption"])
        kept["match"] = kept["match"] & ~recaptioned
        # Nor what detectors found in fewer views of what was scored in more: of the two, embeddings tell the views.
        embedding = schema.fingerprint_column("embed")
        viewed = run["embed"] & ~equal(live[embedding], staged[embedding])
        kept["detect"] = kept["detect"] & ~viewed
        before = failed_tasks(live["errors"])
        failed = {
            task: (ours & holds(staged["tasks_failed"], task))
            | (before[task] & (~ours | same) & ~run[task] & ~(ours & holds(staged["tasks_failed"], task)))
            for task in schema.TASKS
        }
        return cls(superseded, ours, image, marked, same, run, kept, failed)


def _superseded(live: pa.Table, staged: pa.Table) -> Mask:
    """Rows whose live row has moved, since planning, to a version that was met later than ours."""
    moved = ~same_or_null(live["seen_version"], staged["previous_version"])
    other = ~same_or_null(live["seen_version"], staged["seen_version"])
    later = pc.fill_null(pc.greater(_met_at(live), _met_at(staged)), False)
    return moved & other & as_mask(later)


def _met_at(rows: pa.Table) -> pa.Array:
    """When the object was met. Not when the row was written, as others do who read no object: for a verdict, say."""
    read_at = conform_column(rows, schema.IMAGES.field("read_at"))  # null in rows of older versions
    return pc.coalesce(flat(read_at), flat(rows["updated_at"]))


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


def _judged(
    decided: pa.Table, listed: pa.StructArray, verdict: _Verdict, merged: dict[str, pa.Array]
) -> dict[str, pa.Array]:
    """A person's verdict, which outlives whatever the model says of the same bytes, and no change of them.

    Args:
        decided: the live rows as they are.
        listed: what lists of known images say of the staged rows: it counts where no person has judged.
    """
    said = flat(decided["verdict"])
    stands = is_valid(said) & equal(pc.struct_field(said, "content_hash"), merged["content_hash"])
    ours = is_valid(listed) & verdict.ours & (~stands | of_list(said))
    said = chosen(ours, listed, said)
    holds = stands | ours
    # Rows that stay as they were keep whether it decided; of bytes that cannot be read any more nobody has a word.
    stays = verdict.superseded | (verdict.marked & verdict.image.missing)
    before = equal(decided["decision_reason"], BY_VERDICT)
    return with_verdicts(merged["decision"], merged["decision_reason"], said, holds, verdict.ours | (stays & before))


def _source(live: pa.Table, staged: pa.Table, verdict: _Verdict) -> pa.StructArray:
    """The caller's columns: ours as far as our source has them, null or not; the others as they were."""
    theirs, ours = flat(live["source"]), flat(conform_column(staged, live.schema.field("source")))
    has = {field.name: holds(staged["source_columns"], field.name) & ~verdict.superseded for field in theirs.type}
    return overlaid(theirs, ours, has)


def _alt_texts(live: pa.Table, staged: pa.Table, verdict: _Verdict, merged: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Those of captions that stay, where they are missing or the text found in the image is another now."""
    names = conform_column(staged, STAGED.field("found_text_column"))
    out = {name: merged[name] for name in ("alt_text", "alt_text_rule")}
    held = {"uri": live["uri"], "caption": merged["caption"], **out}
    now = pa.table(held | {name: merged[name] for name in ("source",) if name in merged})
    stays = verdict.kept["caption"] & ~verdict.superseded
    for column in names.unique().to_pylist():
        at, texts = restated(now, column)
        named = ~is_valid(names) if column is None else equal(names, column)
        ours = (stays & named)[at]
        order = np.arange(live.num_rows)
        order[at[ours]] = live.num_rows + np.flatnonzero(ours)
        out = {name: pa.concat_arrays([flat(out[name]), texts[name]]).take(pa.array(order)) for name in out}
    return out


def overlaid(theirs: pa.StructArray, ours: pa.StructArray, has: Mapping[str, Mask]) -> pa.StructArray:
    """The caller's columns of rows, those of another source over them.

    Args:
        ours: with the fields that have a mask, under the types of ``theirs``.
        has: by field, the rows that take ours, null or not.
    """
    fields = [
        pc.if_else(pa.array(has[field.name]), member(ours, field.name), member(theirs, field.name))
        if field.name in has
        else member(theirs, field.name)
        for field in theirs.type
    ]
    given = is_valid(theirs) | (np.logical_or.reduce(list(has.values())) & is_valid(ours))
    return pa.StructArray.from_arrays(fields, fields=list(theirs.type), mask=pa.array(~given))


def _merged_errors(live: pa.Table, staged: pa.Table, verdict: _Verdict) -> pa.Array:
    """Our errors, and the live ones that still stand: of tasks that failed, and frames not looked at."""
    live_rows, live_items = explode(live["errors"])
    our_rows, our_items = explode(staged["errors"])
    stages = field_strings(live_items, "stage")
    keep = verdict.superseded[live_rows].copy()
    for task in schema.TASKS:
        ours = verdict.ours & holds(staged["tasks_failed"], task)
        keep |= (stages == task) & (verdict.failed[task] & ~ours)[live_rows]
    # Frames that nobody looked at, as long as vectors or labels stay that say nothing of them.
    partial = verdict.kept["embed"] | (verdict.kept["moderate"] & is_valid(live["labels"]))
    keep |= (stages == "frames") & (partial & ~unseen_frames(staged["errors"]))[live_rows]
    take = ~verdict.superseded[our_rows]
    # Ours first: the first error of a row is the one that is shown beside its status.
    rows = np.concatenate([our_rows[take], live_rows[keep]])
    items = pa.concat_arrays([our_items.filter(pa.array(take)), live_items.filter(pa.array(keep))])
    order = np.argsort(rows, kind="stable")
    offsets = np.searchsorted(rows[order], np.arange(live.num_rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), items.take(pa.array(order)), type=schema.ERRORS)


def _merged_status(live: pa.Table, verdict: _Verdict, merged: dict[str, pa.Array]) -> pa.Array:
    valued = np.logical_or.reduce([is_valid(merged[schema.fingerprint_column(task)]) for task in schema.TASKS])
    any_failed = np.logical_or.reduce([verdict.failed[task] for task in schema.TASKS])
    status = status_of(verdict.image, valued, any_failed)
    return pc.if_else(pa.array(verdict.superseded), live["status"], status)


def _attempts(live: pa.Table, staged: pa.Table, verdict: _Verdict) -> pa.Array:
    """Attempts at this version and these fingerprints, ours included."""
    version = pc.fill_null(staged["seen_version"], live["seen_version"])
    again = same_or_null(live["seen_version"], version) & equal(live["attempt_digest"], staged["attempt_digest"])
    again &= ~as_mask(pc.equal(live["status"], OK))
    before = pc.if_else(pa.array(again), pc.fill_null(live["attempts"], 0), 0)
    return pc.if_else(pa.array(verdict.superseded), live["attempts"], pc.add(before, 1))


class _Taker:
    """Picks values out of the live rows (0 to N-1), the staged rows (N to 2N-1), or none of them (-1)."""

    def __init__(self, live: pa.Table, staged: pa.Table) -> None:
        self._live, self._staged = live, staged
        self.live_rows = np.arange(live.num_rows)
        self.staged_rows = self.live_rows + live.num_rows
        self.no_rows = np.full(live.num_rows, -1)

    def __call__(self, name: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        theirs = conform_column(self._staged, self._live.schema.field(name))
        both = pa.concat_arrays([flat(self._live[name]), flat(theirs)])
        return both.take(pa.array(rows, mask=rows < 0))
