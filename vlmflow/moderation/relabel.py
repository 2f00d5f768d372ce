"""Rows of the images table moderated anew from what is stored: vectors, or the margins of an earlier policy.

Columns in, columns out; no file is opened and no image is read.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.catalog.columns import constant, flat
from vlmflow.catalog.judged import BY_VERDICT, by_model, with_verdicts
from vlmflow.catalog.keys import KeyIndex, Words, digest_of, repeated, to_binary, to_words
from vlmflow.catalog.masks import Mask, equal, is_valid
from vlmflow.catalog.rows import ImageErrors, failed_tasks, rows_of_image_errors, status_of, unseen_frames
from vlmflow.moderation.decide import DECISIONS, Moderation, Moderator
from vlmflow.moderation.policy import Policy

VECTOR_COLUMNS = ("image_id", "embed_run_id", "embed_fingerprint", "view", "time_s", "vector")
NUM_EXAMPLES = 5  # of each way in which decisions change

_FINGERPRINT = schema.fingerprint_column("moderate")
_DECISIONS = ("none", *DECISIONS)  # of a label, in order of gravity; none: the row does not have it


@dataclass(frozen=True, eq=False)
class Target:
    """The policy that rows come under.

    Attributes:
        moves_from: rows under this policy move, and only those that were under ours before: a rollback. None: all
            rows under any other policy move.
        same_margins: digests of policies whose stored margins are those that ours would compute.
    """

    policy: Policy
    moderator: Moderator
    embed_fingerprint: str
    moderate_fingerprint: str
    run_id: str
    moves_from: str | None = None
    same_margins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which rows move, and how. Each an (N,) mask."""

    stored: Mask  # from the margins in the row
    computed: Mask  # from stored vectors
    undetected: Mask  # would move, but a detector of the policy has not seen the image, or failed: left as they are
    other_model: Mask  # would move, but their vectors are another model's: left as they are

    @property
    def moved(self) -> Mask:
        """The rows that come under the policy."""
        return self.stored | self.computed


def wanted_rows(rows: pa.Table, target: Target, within: Mask | None = None) -> Wanted:
    """Decides which rows move.

    Args:
        rows: with the columns :data:`SCANNED`.
        within: (N,) the rows that the caller asks for; None: all.
    """
    digest = rows["policy_digest"]
    if target.moves_from is None:
        move = ~equal(digest, target.policy.digest)
    else:
        move = equal(digest, target.moves_from) & equal(rows["previous_policy"], target.policy.digest)
    if within is not None:
        move &= within
    has_vectors = is_valid(rows["embed_run_id"])
    same = pc.fill_null(pc.is_in(digest, value_set=pa.array(target.same_margins, pa.string())), False)
    stored = move & np.asarray(same) & equal(rows[_FINGERPRINT], target.moderate_fingerprint)
    computed = move & ~stored & has_vectors & equal(rows["embed_fingerprint"], target.embed_fingerprint)
    other = move & ~stored & ~computed & (has_vectors | is_valid(digest))
    undetected = np.zeros(rows.num_rows, np.bool_)
    if len(target.moderator.rules):
        # Scores may be of an earlier run, in other views, where a later one failed.
        seen = target.moderator.rules.held(rows["detections"]) & ~failed_tasks(rows["errors"])["detect"]
        undetected = (stored | computed) & ~seen
    return Wanted(stored & ~undetected, computed & ~undetected, undetected, other)


# What :func:`wanted_rows` reads.
SCANNED = (
    "policy_digest",
    "previous_policy",
    "embed_run_id",
    "embed_fingerprint",
    "detections",
    "errors",
    _FINGERPRINT,
)


@dataclass(frozen=True, eq=False)
class ScoredVectors:
    """The worst margins of the images of one file of vectors. N: images, L: labels."""

    index: KeyIndex  # image and run of the vectors -> position
    margins: NDArray[np.float32]  # (N, L)
    views: NDArray[np.int16]  # (N, L), numbers of `view_names`
    view_names: tuple[str, ...]
    times: NDArray[np.float32] | None  # (N, L) seconds, not a number for a still; None: stills alone


def score_vectors(rows: pa.Table, target: Target) -> ScoredVectors:
    """Scores the vectors of one file, those of other models left out.

    Args:
        rows: the columns :data:`VECTOR_COLUMNS`.
    """
    rows = rows.filter(pc.equal(rows["embed_fingerprint"], target.embed_fingerprint))
    high, low = _keys(rows)
    starts = _starts(high, low)
    if repeated(high[starts], low[starts]).any():  # another program has put the rows in an order of its own
        order = np.lexsort((low, high))
        rows, high, low = rows.take(pa.array(order)), high[order], low[order]
        starts = _starts(high, low)
    margins, deciding = target.moderator.worst_views(_matrix(flat(rows["vector"]), target.moderator.dim), starts)
    names = pc.dictionary_encode(flat(rows["view"]))
    codes = names.indices.to_numpy(zero_copy_only=False).astype(np.int16)
    times = None
    if rows["time_s"].null_count < rows.num_rows:
        times = np.asarray(pc.fill_null(flat(rows["time_s"]), np.nan), np.float32)[deciding]
    index = KeyIndex(high[starts], low[starts], np.arange(len(starts)))
    return ScoredVectors(index, margins, codes[deciding], tuple(names.dictionary.to_pylist()), times)


@dataclass
class Changes:
    """What became of rows.

    Attributes:
        decisions: images by decision before and after, unchanged ones included.
        labels: images by label and its decision before and after, where that changed; a label that was not there
            counts as `none`.
        examples: a few images of each change of decision.
    """

    num_moved: int = 0
    num_from_margins: int = 0
    num_other_model: int = 0
    num_undetected: int = 0
    num_without_vectors: int = 0
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    labels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: list[dict[str, str | None]] = field(default_factory=list)

    def add(self, other: Changes) -> None:
        """Adds what became of further rows."""
        self.num_moved += other.num_moved
        self.num_from_margins += other.num_from_margins
        self.num_other_model += other.num_other_model
        self.num_undetected += other.num_undetected
        self.num_without_vectors += other.num_without_vectors
        self.decisions.update(other.decisions)
        self.labels.update(other.labels)
        held = Counter((example["before"], example["after"]) for example in self.examples)
        for example in other.examples:
            change = (example["before"], example["after"])
            if held[change] < NUM_EXAMPLES:
                held[change] += 1
                self.examples.append(example)


def relabel(
    rows: pa.Table, wanted: Wanted, target: Target, scored: tuple[ScoredVectors, ...]
) -> tuple[pa.Table, Changes]:
    """Moderates rows anew.

    Args:
        rows: of the images table.
        scored: of the files that may hold vectors of these rows.

    Returns:
        The rows in their order, those that did not move as they were; and what changed.
    """
    at = np.flatnonzero(wanted.moved)
    changes = Changes(
        num_moved=len(at),
        num_other_model=int(wanted.other_model.sum()),
        num_undetected=int(wanted.undetected.sum()),
    )
    if not len(at):
        return rows, changes
    all_move = len(at) == rows.num_rows  # the common case, in which nothing need be picked out
    old = rows if all_move else rows.take(pa.array(at))
    margins, views, times, found = _margins(old, wanted.stored[at], target, scored)
    detections = flat(old["detections"]) if len(target.moderator.rules) else None
    result = target.moderator.decide(margins[found], views, found, times, detections, unseen_frames(old["errors"]))
    changes.num_from_margins = int(wanted.stored.sum())
    changes.num_without_vectors = int((~found).sum())
    new = _with_moderation(old, result, found, target)
    _count(changes, old, new)
    if all_move:
        return new, changes
    order = np.arange(rows.num_rows)
    order[at] = rows.num_rows + np.arange(len(at))
    return pa.concat_tables([rows, new]).take(pa.array(order)), changes


def _margins(
    rows: pa.Table, stored: Mask, target: Target, scored: tuple[ScoredVectors, ...]
) -> tuple[NDArray[np.float32], pa.StringArray, pa.FloatArray | None, Mask]:
    """Margins (N, L), the names of views and the times of those found (flat), and which were found (N,)."""
    shape = (rows.num_rows, len(target.policy.labels))
    margins = np.full(shape, np.nan, np.float32)
    times = np.full(shape, np.nan, np.float32)
    views = np.zeros(shape, np.int32)
    names: list[str] = []
    found = np.zeros(len(margins), np.bool_)

    def number(local: tuple[str, ...]) -> NDArray[np.int32]:
        names.extend(name for name in local if name not in names)
        return np.array([names.index(name) for name in local], np.int32)

    if stored.any():
        labels = flat(rows["labels"].filter(pa.array(stored)))
        items = pc.list_flatten(labels)
        items = items.filter(pc.is_null(pc.struct_field(items, "detector")))
        margins[stored] = _floats(items, "margin").reshape(-1, shape[1])
        times[stored] = _floats(items, "time_s").reshape(-1, shape[1])
        coded = pc.dictionary_encode(pc.struct_field(items, "view"))
        local = number(tuple(coded.dictionary.to_pylist()))
        views[stored] = local[coded.indices.to_numpy(zero_copy_only=False)].reshape(-1, shape[1])
        found |= stored
    high, low = _keys(rows)
    for part in scored:
        hits = np.where(stored, -1, part.index.find(high, low))
        images = np.flatnonzero(hits >= 0)
        if len(images):
            # The worst of all files: another program may have put an image's views in several.
            theirs = part.margins[hits[images]]
            image, label = np.nonzero(~found[images, None] | (theirs > margins[images]) | np.isnan(theirs))
            at = hits[images][image], label
            margins[images[image], label] = part.margins[at]
            views[images[image], label] = number(part.view_names)[part.views[at]]
            times[images[image], label] = np.nan if part.times is None else part.times[at]
            found[images] = True
    view_names = pa.array(names, pa.string()).take(pa.array(views[found].ravel()))
    any_times = not np.isnan(times[found]).all()
    frame_times = pa.array(times[found].ravel(), pa.float32(), from_pandas=True) if any_times else None
    return margins, view_names, frame_times, found


def _with_moderation(old: pa.Table, result: Moderation, found: Mask, target: Target) -> pa.Table:
    """Rows with new labels and decision, and with what hangs on them."""
    image = rows_of_image_errors(old["errors"])
    # What was scored is no longer what is there: a person decides, whatever the policy.
    doubtful = pa.array(image.unreadable | image.failed)
    fingerprint = pc.if_else(pa.array(found), target.moderate_fingerprint, pa.scalar(None, pa.string()))
    if target.moves_from is None:
        previous = pc.if_else(pc.is_valid(old["policy_digest"]), old["policy_digest"], old["previous_policy"])
    else:  # the one that is left was withdrawn, and of what there was before the one gone back to no row tells
        previous = pa.nulls(old.num_rows, pa.string())
    # Detectors that failed are none of a policy without any. Nor are scores that they had given before: a later policy
    # would take them for those of the failed attempt.
    ends = ("moderate",) if len(target.moderator.rules) else ("moderate", "detect")
    errors, status = _without_failures(old, image, ends)
    doubted = failed_tasks(old["errors"])["detect"] & ("detect" in ends)
    judged = flat(old["verdict"])
    by_person = equal(old["decision_reason"], BY_VERDICT)
    old = by_model(old)
    values: dict[str, pa.Array] = {
        "labels": result.labels,
        **with_verdicts(
            pc.if_else(doubtful, old["decision"], result.decision),
            pc.if_else(doubtful, old["decision_reason"], result.reason),
            judged,
            is_valid(judged),
            by_person,
        ),
        "policy_name": constant(target.policy.name, old.num_rows),
        "policy_version": constant(target.policy.version, old.num_rows),
        "policy_digest": constant(target.policy.digest, old.num_rows),
        "previous_policy": previous,
        _FINGERPRINT: pc.if_else(doubtful, pa.scalar(None, pa.string()), fingerprint),
        "errors": errors,
        "status": status,
        **_without_detections(old, doubted),
        "run_id": constant(target.run_id, old.num_rows),
        "updated_at": pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP), old.num_rows),
    }
    columns = [values[field.name].cast(field.type) if field.name in values else old[field.name] for field in old.schema]
    return pa.table(columns, schema=old.schema)


def _without_failures(old: pa.Table, image: ImageErrors, ends: tuple[str, ...]) -> tuple[pa.Array, pa.Array]:
    """Errors without those of tasks that a moderation puts an end to, and the status that is left."""
    failed = failed_tasks(old["errors"])
    others = np.logical_or.reduce([marks for task, marks in failed.items() if task not in ends])
    ended = np.logical_or.reduce([failed[task] for task in ends])
    if not ended.any():
        return old["errors"], old["status"]
    errors = old["errors"].to_pylist()
    for row in np.flatnonzero(ended).tolist():
        errors[row] = [error for error in errors[row] if error["stage"] not in ends]
    status = status_of(image, np.ones(old.num_rows, np.bool_), others)
    return pa.array(errors, schema.ERRORS), pc.if_else(pa.array(ended), status, flat(old["status"]))


def _without_detections(old: pa.Table, doubted: Mask) -> dict[str, pa.Array]:
    columns = [*schema.TASK_COLUMNS["detect"].names, schema.fingerprint_column("detect")]
    return {
        name: pc.if_else(pa.array(doubted), pa.scalar(None, old.schema.field(name).type), flat(old[name]))
        for name in columns
        if name in old.column_names
    }


def _count(changes: Changes, old: pa.Table, new: pa.Table) -> None:
    pairs = pa.table({"before": old["decision"], "after": new["decision"]})
    for entry in pairs.group_by(["before", "after"]).aggregate([([], "count_all")]).to_pylist():
        changes.decisions[entry["before"], entry["after"]] += entry["count_all"]
        if entry["before"] != entry["after"]:
            same = pc.and_(pc.equal(pairs["before"], entry["before"]), pc.equal(pairs["after"], entry["after"]))
            shown = new.select(["image_id", "uri", "decision_reason"]).filter(same).slice(0, NUM_EXAMPLES).to_pylist()
            changes.examples += [{**row, "before": entry["before"], "after": entry["after"]} for row in shown]
    changes.labels += _label_changes(old, new)


def _label_changes(old: pa.Table, new: pa.Table) -> Counter[tuple[str, str, str]]:
    both = pa.concat_arrays([flat(old["labels"]), flat(new["labels"])])
    names, gravest = _gravest(both)
    shape = (max(1, len(names)), len(_DECISIONS), len(_DECISIONS))
    label = np.broadcast_to(np.arange(len(names)), (old.num_rows, len(names)))
    found = np.ravel_multi_index((label, gravest[: old.num_rows], gravest[old.num_rows :]), shape)
    counts = np.bincount(found.ravel(), minlength=int(np.prod(shape))).reshape(shape)
    return Counter(
        {
            (names[number], _DECISIONS[one], _DECISIONS[other]): int(counts[number, one, other])
            for number, one, other in np.argwhere(counts).tolist()
            if one != other
        }
    )


def _gravest(labels: pa.ListArray[Any]) -> tuple[list[str], NDArray[np.int8]]:
    """The labels of N rows, and (N, labels) the gravest decision on each: several outputs of a detector may feed one.

    Decisions are numbers of _DECISIONS.
    """
    items = pc.list_flatten(labels)
    names = pc.dictionary_encode(_label_names(items))
    decisions = pc.index_in(pc.struct_field(items, "decision"), value_set=pa.array(_DECISIONS))
    gravest = np.zeros((len(labels), len(names.dictionary)), np.int8)
    at = np.asarray(pc.list_parent_indices(labels)), np.asarray(names.indices)
    np.maximum.at(gravest, at, np.asarray(pc.fill_null(decisions, 0), np.int8))
    return names.dictionary.to_pylist(), gravest


def _label_names(items: pa.StructArray) -> pa.Array:
    """Labels as changes are counted by; what a detector says of one is counted apart."""
    names, detectors = pc.struct_field(items, "label"), pc.struct_field(items, "detector")
    by_detector = pc.binary_join_element_wise(names, " (", detectors, ")", "")
    return pc.if_else(pc.is_null(detectors), names, by_detector)


def _matrix(vectors: pa.ListArray[Any], dim: int) -> NDArray[np.float32]:
    """(N, dim) vectors; one of another length, which another program wrote, is no number: its image is not scored."""
    fits = np.asarray(pc.fill_null(pc.equal(pc.list_value_length(vectors), dim), False), np.bool_)
    values = np.asarray(pc.list_flatten(vectors.filter(pa.array(fits))), np.float32).reshape(-1, dim)
    if fits.all():
        return values
    out = np.full((len(vectors), dim), np.nan, np.float32)
    out[fits] = values
    return out


def _starts(high: Words, low: Words) -> NDArray[np.int64]:
    """Where another key begins than that of the row before."""
    return np.flatnonzero(np.diff(high, prepend=~high[:1]) | np.diff(low, prepend=~low[:1]))


def _keys(rows: pa.Table) -> tuple[Words, Words]:
    """Keys of image and run together, (N,) each: vectors belong to a row only if its run made them."""
    high, low = to_words(to_binary(rows["image_id"]))
    runs = pc.dictionary_encode(flat(rows["embed_run_id"]).fill_null(""))
    digests = [int(digest_of(run), 16) for run in runs.dictionary.to_pylist()]
    numbers = runs.indices.to_numpy(zero_copy_only=False)
    highs = np.array([digest >> 64 for digest in digests], np.uint64)
    lows = np.array([digest & (1 << 64) - 1 for digest in digests], np.uint64)
    return high ^ highs[numbers], low ^ lows[numbers]


def _floats(items: pa.StructArray, name: str) -> NDArray[np.float32]:
    return np.asarray(pc.fill_null(pc.struct_field(items, name), np.nan), np.float32)
