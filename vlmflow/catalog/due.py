"""Which tasks are due for which image, and why. Columns in, columns out."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.detections import Detection
from vlmflow.catalog.keys import questions_digests, text_digests
from vlmflow.catalog.masks import Mask, as_mask, decoded_alike, equal, is_valid
from vlmflow.catalog.rows import (
    FAILED,
    MISSING,
    OK,
    UNREADABLE,
    attempt_digest,
    failed_tasks,
    image_attempt_digest,
    rows_of_image_errors,
)

MAX_ATTEMPTS = 3  # per object version and fingerprints

# What a task reads of others. `embed`, `detect` and `moderate` go together in the pipeline, which holds no stored
# vectors or scores.
READS = {"moderate": ("embed", "detect"), "match": ("caption",)}
ALSO_RUNS = {"moderate": ("embed", "detect")}

# Why a task is due, as numbers: millions of rows carry them.
REASONS = (
    "",
    "new",
    "changed",
    "decoder",
    "retry",
    "task_added",
    "text_changed",
    "questions_changed",
    "undetected",
    "fingerprint",
    "needed",
    "recheck",
)
NOT_DUE, NEW, CHANGED, DECODER, RETRY, TASK_ADDED, TEXT_CHANGED, QUESTIONS_CHANGED, UNDETECTED, FINGERPRINT, *_ = range(
    len(REASONS)
)
NEEDED, RECHECK = range(FINGERPRINT + 1, len(REASONS))

Reasons: TypeAlias = npt.NDArray[np.int8]

# Columns of the images table that decide; the rest of a live row is not read for planning.
LEDGER = (
    "image_id",
    "seen_version",
    "status",
    "errors",
    "attempts",
    "attempt_digest",
    "policy_digest",
    "text_digest",
    "questions_digest",
    "decoder",
    *(schema.fingerprint_column(task) for task in schema.TASKS),
)

# Beside them, null where nothing is asked of detectors: the row lacks a score that the run would store.
LACKS_DETECTIONS = "_lacks_detections"
# Likewise, null where images are not read again: the row's was last read before the time that the run asks for.
READ_LONG_AGO = "_read_long_ago"


@dataclass(frozen=True)
class PlanRequest:
    """What a run means to do."""

    tasks: tuple[str, ...]
    fingerprints: dict[str, str]  # of each of these tasks; that of `moderate` leaves the policy out
    policy_digest: str | None
    decoder: str
    date: dt.date  # ingest_date of images not seen before
    limit: int | None = None  # at most this many of the images due, in listing order; all are listed
    retry: tuple[str, ...] = ()  # rows of these statuses are due again, however often they were tried
    questions: tuple[str, ...] = ()  # that `answer` asks of every image, besides the image's own
    detections: tuple[Detection, ...] = ()  # that `detect` stores of every image
    read_before: dt.datetime | None = None  # images last read before, whose source tells no version, are read again
    found_text_column: str | None = None  # of the caller's columns, for alternative texts


@dataclass
class Due:
    """Per reference: what to do. Each an (N,) mask, or one per task of the request."""

    new: Mask
    wanted: Mask  # the image goes into the pipeline
    if_same: dict[str, Mask]  # tasks to run should the bytes be those the live row was made of
    attempts: npt.NDArray[np.int32]  # before this run, at this version and these fingerprints
    failed_before: Mask  # the live row is not `ok`, and the object has not changed since
    only_rechecked: Mask  # the live row is good, and nothing is due but to see whether the bytes are still those
    num_unchanged: int
    num_exhausted: int
    num_policy_differs: int
    num_unwatched: int  # at http(s) urls without a version, and not read again either
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (task, reason) -> images


def decide(references: pa.Table, live: pa.Table, exists: Mask, request: PlanRequest) -> Due:
    """Decides for each reference which tasks are due.

    Args:
        references: REFERENCE columns; of them `uri`, `object_version`, `text` and `questions` count.
        live: the columns :data:`LEDGER` of the live row of each reference, :data:`LACKS_DETECTIONS` if the request has
            detections and :data:`READ_LONG_AGO` if it has a time; nulls where there is no row.
        exists: whether there is a live row.
    """
    version = references["object_version"]
    changed = exists & is_valid(version) & ~equal(version, live["seen_version"])
    same = exists & ~changed
    state = _State.of(live, same, request)
    rechecked = exists & ~is_valid(version) & _read_long_ago(live, request)
    reasons = {task: _reasons(task, references, live, state, request) for task in request.tasks}
    _close(reasons, state)
    blank = np.zeros(len(exists), dtype=np.bool_)
    if_same = {task: exists & (reason != NOT_DUE) for task, reason in reasons.items()}
    for reason in reasons.values():
        reason[~exists] = NEW
        reason[changed] = CHANGED
        reason[state.decoder_changed] = DECODER
        reason[state.retried] = RETRY
        reason[state.blocked] = NOT_DUE
        reason[rechecked & (reason == NOT_DUE)] = RECHECK
    wanted = np.logical_or.reduce([reason != NOT_DUE for reason in reasons.values()])
    good = equal(live["status"], OK) & decoded_alike(live["decoder"], request.decoder)
    exhausted = ~wanted & (state.gave_up | np.logical_or.reduce([blank, *state.exhausted.values()]))
    counts: Counter[tuple[str, str]] = Counter()
    for task, reason in reasons.items():
        for number, count in enumerate(np.bincount(reason, minlength=len(REASONS)).tolist()):
            if count and number != NOT_DUE:
                counts[task, REASONS[number]] += count
    return Due(
        new=~exists,
        wanted=wanted,
        if_same=if_same,
        attempts=state.attempts,
        failed_before=same & ~equal(live["status"], OK),
        only_rechecked=good & np.logical_and.reduce([reason == RECHECK for reason in reasons.values()]),
        num_unchanged=int((exists & ~wanted & ~exhausted).sum()),
        num_exhausted=int(exhausted.sum()),
        num_policy_differs=int(_policy_differs(live, exists, reasons, request).sum()),
        num_unwatched=_num_unwatched(references, request),
        counts=counts,
    )


def _read_long_ago(live: pa.Table, request: PlanRequest) -> Mask:
    if request.read_before is None:
        return np.zeros(live.num_rows, dtype=np.bool_)
    return as_mask(pc.fill_null(live[READ_LONG_AGO], True))


def _num_unwatched(references: pa.Table, request: PlanRequest) -> int:
    """The images at http(s) urls of which nobody would know that they have changed."""
    if request.read_before is not None or references["object_version"].null_count == 0:
        return 0
    unknown = references["uri"].filter(pc.is_null(references["object_version"]))
    return pc.sum(pc.match_substring_regex(unknown, "^https?://")).as_py() or 0


@dataclass(frozen=True)
class _State:
    """What the last attempt left behind, in rows whose object has not changed. Each an (N,) mask or number."""

    attempts: npt.NDArray[np.int32]
    decoder_changed: Mask  # unreadable, and the decoder is another one now
    retried: Mask  # the whole image failed, or retrying was asked for, and it is tried again
    gave_up: Mask  # the whole image failed too often
    blocked: Mask  # not to be tried again, whatever the fingerprints say
    failed: dict[str, Mask]  # the task failed; of objects that have changed too: the bytes may be the same
    exhausted: dict[str, Mask]  # the task failed too often

    @classmethod
    def of(cls, live: pa.Table, same: Mask, request: PlanRequest) -> _State:
        # Older rows have the first also where the whole image failed.
        digests = attempt_digest(request.fingerprints, request.questions), image_attempt_digest(request.decoder)
        again = same & as_mask(pc.is_in(live["attempt_digest"], pa.array(digests))) & ~equal(live["status"], OK)
        stored = pc.fill_null(live["attempts"], 0).to_numpy().astype(np.int32)
        attempts = np.where(again, stored, 0).astype(np.int32)
        asked = same & as_mask(pc.fill_null(pc.is_in(live["status"], pa.array(request.retry, pa.string())), False))
        spent = (attempts >= MAX_ATTEMPTS) & ~asked
        unreadable = same & equal(live["status"], UNREADABLE)
        decoder_changed = unreadable & ~equal(live["decoder"], request.decoder)
        of_image = rows_of_image_errors(live["errors"]).any
        whole = same & (equal(live["status"], MISSING) | (equal(live["status"], FAILED) & of_image))
        failed = failed_tasks(live["errors"])
        exhausted = {task: failed[task] & spent for task in request.tasks}
        if "embed" in exhausted and "moderate" in exhausted:
            # Without vectors there is nothing to moderate.
            exhausted["moderate"] = exhausted["moderate"] | exhausted["embed"]
        return cls(
            attempts=attempts,
            decoder_changed=decoder_changed,
            retried=(whole & ~spent) | (unreadable & asked & ~decoder_changed),
            gave_up=whole & spent,
            blocked=(unreadable & ~decoder_changed & ~asked) | (whole & spent),
            failed=failed,
            exhausted=exhausted,
        )


def _reasons(task: str, references: pa.Table, live: pa.Table, state: _State, request: PlanRequest) -> Reasons:
    """Why the task is due by itself, as if the bytes were the same."""
    column = live[schema.fingerprint_column(task)]
    reasons = np.full(len(state.attempts), NOT_DUE, dtype=np.int8)
    reasons[~is_valid(column)] = TASK_ADDED
    if task == "match":
        # Where there are no texts at all, which is common, there is nothing to hash row by row.
        texts = references["text"]
        digests = text_digests(texts) if texts.null_count < len(texts) else pa.nulls(len(texts), pa.string())
        text_same = equal(digests, live["text_digest"]) | (~is_valid(digests) & ~is_valid(live["text_digest"]))
        reasons[is_valid(column) & ~text_same] = TEXT_CHANGED
    if task == "answer":
        asked = questions_digests(references["questions"], request.questions)
        reasons[is_valid(column) & ~equal(asked, live["questions_digest"])] = QUESTIONS_CHANGED
    if task == "detect" and request.detections:
        # The fingerprint says which models looked, not what the policy then called them or took of them.
        lacks = as_mask(pc.fill_null(live[LACKS_DETECTIONS], False))
        reasons[is_valid(column) & lacks] = UNDETECTED
    reasons[is_valid(column) & ~equal(column, request.fingerprints[task])] = FINGERPRINT
    # Whatever its fingerprint: results of an earlier run on equal bytes stay, and it fits them when a later one failed.
    reasons[state.failed[task]] = RETRY
    reasons[state.exhausted[task]] = NOT_DUE
    return reasons


def _close(reasons: dict[str, Reasons], state: _State) -> None:
    """A task is due when one it reads is due; and one whose output is kept nowhere runs again for its reader."""
    for reader, read in _pairs(READS):
        if reader in reasons and read in reasons:
            pulled = (reasons[read] != NOT_DUE) & (reasons[reader] == NOT_DUE) & ~state.exhausted[reader]
            reasons[reader][pulled] = NEEDED
    for reader, read in _pairs(ALSO_RUNS):
        if reader in reasons and read in reasons:
            reasons[read][(reasons[reader] != NOT_DUE) & (reasons[read] == NOT_DUE)] = NEEDED


def _pairs(reads: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(reader, read) for reader, several in reads.items() for read in several]


def _policy_differs(live: pa.Table, exists: Mask, reasons: dict[str, Reasons], request: PlanRequest) -> Mask:
    """Rows that keep labels of another policy, because nothing but the policy differs; if read again, most of them."""
    if request.policy_digest is None or "moderate" not in reasons:
        return np.zeros(len(exists), dtype=np.bool_)
    other = is_valid(live["policy_digest"]) & ~equal(live["policy_digest"], request.policy_digest)
    keeps: Mask = exists & other & np.isin(reasons["moderate"], (NOT_DUE, RECHECK))
    return keeps
