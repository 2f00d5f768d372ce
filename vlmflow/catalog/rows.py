"""What a row says: status, decision and provenance of a new row, and how a new result joins the live row.

Everything here is columns in, columns out; no file is opened. A *staged* row is a row of IMAGES as this run would
write it, with the columns of :data:`STAGED` behind it, which say what the run did.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vlmflow import schema
from vlmflow.alt_text import QUOTE, alt_text, quotes
from vlmflow.catalog.columns import conform_column, constant, flat, member, taken
from vlmflow.catalog.judged import with_verdicts
from vlmflow.catalog.keys import digest_of, questions_digests, text_digests
from vlmflow.catalog.masks import Mask, alike, as_mask, equal, explode, field_strings, holds, is_valid
from vlmflow.errors import RowErrorClass

OK, PARTIAL, UNREADABLE, MISSING, FAILED = "ok", "partial", "unreadable", "missing", "failed"
STATUSES = (OK, PARTIAL, UNREADABLE, MISSING, FAILED)
REVIEW = "review"
UNSCORED = "unscored"  # decision_reason of a row without a moderation result

POLICY_COLUMNS = ("policy_name", "policy_version", "policy_digest")

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
        ("matched_caption", pa.string()),  # that `match` scored, if it ran; null: there was none
        ("source_columns", pa.list_(pa.string())),  # the caller's columns that this run's source has; null: none
        ("found_text_column", pa.string()),  # of these, the one that alternative texts quote; null: none
    ]
)


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
    questions: tuple[str, ...] = ()  # that `answer` asked of every image
    found_text_column: str | None = None  # of the caller's columns, for alternative texts

    @property
    def attempt_digest(self) -> str:
        """Attempts are counted per object version and this digest of what they ran with."""
        return attempt_digest(self.fingerprints, self.questions)


def attempt_digest(fingerprints: dict[str, str], questions: Sequence[str] = ()) -> str:
    """One digest of the fingerprints of a run's tasks, whatever their order, and of the questions that it asks."""
    asked = questions if "answer" in fingerprints else ()
    return digest_of(*(f"{task}={fingerprints[task]}" for task in sorted(fingerprints)), *asked)


def image_attempt_digest(decoder: str) -> str:
    """What stands for :func:`attempt_digest` where the whole image failed: no task has seen it.

    Runs with other tasks count on then, where each would begin anew after the other, and try it for ever.
    """
    return digest_of("image", decoder)


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
    now = pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), schema.TIMESTAMP), rows.num_rows)
    filled: dict[str, pa.Array] = {
        "seen_version": rows["object_version"],
        "status": status_of(images, any_run, any_failed),
        "attempts": pc.add(pc.fill_null(rows["attempts"], 0), 1),
        "attempt_digest": pc.if_else(
            pa.array(images.any), image_attempt_digest(constants.decoder), constants.attempt_digest
        ),
        "decoder": constant(constants.decoder, rows.num_rows),
        "run_id": constant(constants.run_id, rows.num_rows),
        "read_at": now,
        "updated_at": now,
        "source_columns": pa.repeat(pa.scalar(_source_columns(rows), pa.list_(pa.string())), rows.num_rows),
        "found_text_column": constant(constants.found_text_column, rows.num_rows),
    }
    for task in schema.TASKS:
        filled |= _task_columns(task, rows, constants, run[task])
    same = pa.array(equal(rows["content_hash"], rows["previous_hash"]))
    before = pc.if_else(same, rows["previous_caption"], pa.scalar(None, pa.string()))
    filled["matched_caption"] = pc.if_else(pa.array(run["caption"]), filled["caption"], before)
    filled |= alt_texts(rows, filled["caption"], constants.found_text_column)
    decision = conform_column(rows, schema.WRITER_OPTIONAL.field("decision"))
    reason = conform_column(rows, schema.WRITER_OPTIONAL.field("decision_reason"))
    scored = pa.array(run["moderate"] & is_valid(decision))
    filled["decision"] = pc.if_else(scored, decision, REVIEW)
    filled["decision_reason"] = pc.if_else(scored, reason, UNSCORED)
    said = flat(conform_column(rows, schema.WRITER_OPTIONAL.field("verdict")))
    known = is_valid(said)
    filled |= with_verdicts(filled["decision"], filled["decision_reason"], said, known, known)
    wanted = pa.schema([*columns, *STAGED])
    out = [
        filled[field.name].cast(field.type) if field.name in filled else conform_column(rows, field) for field in wanted
    ]
    return pa.table(out, schema=wanted)


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


def error_classes(errors: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The classes of each row's errors, each once a row, however many tasks failed so: the rows, and the classes."""
    rows, items = explode(errors)
    coded = pc.dictionary_encode(pc.fill_null(pc.struct_field(items, "class"), ""))
    count = max(1, len(coded.dictionary))
    pairs = np.unique(rows * count + coded.indices.to_numpy())
    return pairs // count, coded.dictionary.take(pa.array(pairs % count))


def rows_of_image_errors(errors: pa.ChunkedArray) -> ImageErrors:
    """Which rows carry an error of reading or decoding. ``errors``: a column of type ``schema.ERRORS``."""
    rows, items = explode(errors)
    of_image = np.isin(field_strings(items, "stage"), IMAGE_STAGES)
    classes = field_strings(items, "class")
    missing, unreadable = classes == RowErrorClass.MISSING, np.isin(classes, [str(c) for c in UNREADABLE_CLASSES])

    def mark(which: Mask) -> Mask:
        marks = np.zeros(len(errors), dtype=np.bool_)
        marks[rows[of_image & which]] = True
        return marks

    # Of several errors the one that says least about the bytes decides: a failed read may hide a good image.
    failed = mark(~missing & ~unreadable)
    missing = mark(missing) & ~failed
    return ImageErrors(missing, mark(unreadable) & ~failed & ~missing, failed)


def status_of(image: ImageErrors, any_values: Mask, any_failed: Mask) -> pa.Array:
    """The status of each row.

    Args:
        any_values: rows in which a task has left values.
        any_failed: rows in which a task has failed.
    """
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
        elif field.name == "questions_digest":
            value = questions_digests(rows["questions"], constants.questions)
        elif field.name in given:
            value = constant(given[field.name], rows.num_rows)
        else:
            value = conform_column(rows, field)
        out[field.name] = pc.if_else(mask, value, pa.scalar(None, field.type))
    return out


def _source_columns(rows: pa.Table) -> list[str] | None:
    """The caller's columns that rows came with."""
    if "source" not in rows.column_names:
        return None
    return [field.name for field in rows.schema.field("source").type]


def alt_texts(
    rows: pa.Table, captions: pa.Array | pa.ChunkedArray, found_text_column: str | None
) -> dict[str, pa.Array]:
    """The alternative texts of the captions, and the rules that they break.

    Args:
        rows: `uri`, and `source` if there is one.
    """
    found = _found_texts(rows, found_text_column)
    texts = [alt_text(*of_row) for of_row in zip(captions.to_pylist(), rows["uri"].to_pylist(), found, strict=True)]
    return {
        "alt_text": pa.array([text for text, _ in texts], pa.string()),
        "alt_text_rule": pa.array([rule for _, rule in texts], pa.string()),
    }


# What :func:`restated` reads, and of that :func:`doubtful`; either beside `source`.
TEXTS = ("uri", "caption", "alt_text", "alt_text_rule")
DOUBTED = ("alt_text", "alt_text_rule")

# Whitespace that Python's `split` and `join` would change, for RE2: `\s` of that is ASCII alone.
_UNTIDY = r"^ |  | $|[\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
_ROWS_AT_ONCE = 1 << 14  # whose texts are copied to be compared: they may be long


def restated(rows: pa.Table, found_text_column: str | None) -> tuple[npt.NDArray[np.int64], dict[str, pa.Array]]:
    """The captioned rows whose alternative text is not what it should be, and what :func:`alt_texts` says of them.

    It is missing, as in rows of older versions, or does not quote what the caller has found in the image: that is
    another text now, or the job did not name its column then.

    Args:
        rows: :data:`TEXTS`, and `source` if there is one.
        found_text_column: None, or one that the rows do not have: nothing is known of what is quoted.
    """
    numbers = np.flatnonzero(doubtful(rows, found_text_column) & is_valid(rows["caption"]))
    source = ["source"] if _has(rows, found_text_column) else []
    rows = taken(rows.select([*TEXTS, *source]), numbers)
    new = alt_texts(rows, rows["caption"], found_text_column)
    # One that is as it should be after all, whatever it looks like, is not written again every night.
    differs = np.logical_or.reduce([~alike(flat(rows[name]), values) for name, values in new.items()])
    return numbers[differs], {name: values.filter(pa.array(differs)) for name, values in new.items()}


def doubtful(rows: pa.Table, found_text_column: str | None) -> Mask:
    """The rows whose alternative text, if they have a caption, may not be what it should be; see :func:`restated`.

    Args:
        rows: :data:`DOUBTED`, and `source` if there is one.
    """
    lacks: Mask = ~is_valid(rows["alt_text"]) & ~is_valid(rows["alt_text_rule"])
    if found_text_column is None or not _has(rows, found_text_column):
        return lacks
    batches = rows.select(["alt_text", "source"]).to_batches(max_chunksize=_ROWS_AT_ONCE)
    others = [_misquotes(batch["alt_text"], member(batch["source"], found_text_column)) for batch in batches]
    lacks |= np.concatenate([np.empty(0, np.bool_), *others])
    return lacks


def _misquotes(texts: pa.Array, found: pa.Array) -> Mask:
    """Texts that do not say what was found, or quote something else; no text says nothing."""
    quoting = as_mask(pc.fill_null(pc.match_substring(texts, QUOTE), False))
    other = is_valid(found) | quoting
    # No text that is right becomes a Python object, but for captions that say themselves what was found.
    said = _tidy_texts(found)
    empty = equal(said, "")
    other &= ~(empty & is_valid(texts) & ~quoting)
    at = pa.array(np.flatnonzero(quoting))
    quoted = pc.list_element(pc.split_pattern(texts.take(at), QUOTE, max_splits=1, reverse=True), 1)
    other[quoting] &= ~equal(quoted, pc.binary_join_element_wise(said.take(at), '".', "")) | empty[quoting]
    asked = np.flatnonzero(other & is_valid(texts))
    pairs = zip(texts.take(pa.array(asked)).to_pylist(), found.take(pa.array(asked)).to_pylist(), strict=True)
    other[asked] = [not quotes(text, _as_text(value)) for text, value in pairs]
    return other


def _has(rows: pa.Table, column: str | None) -> bool:
    return column is not None and column in (_source_columns(rows) or ())


def _found_texts(rows: pa.Table, column: str | None) -> list[str | None]:
    if column is None or not _has(rows, column):
        return [None] * rows.num_rows
    return [_as_text(value) for chunk in rows["source"].chunks for value in member(chunk, column).to_pylist()]


def _as_text(value: object) -> str | None:
    """A caller's value as one text; of a list, such as lines that were read in the image, its parts."""
    if isinstance(value, list):
        return " ".join(str(part) for part in value if part is not None)
    return None if value is None else str(value)


def _tidy_texts(found: pa.Array) -> pa.Array:
    """:func:`_as_text` of those values that Arrow words as Python does, and whose whitespace is tidy; else null."""
    if pt.is_list(found.type) and pt.is_string(found.type.value_type):
        found = pc.binary_join(found, " ")  # null where a part is
    elif pt.is_integer(found.type):
        found = found.cast(pa.string())
    elif not pt.is_string(found.type):
        return pa.nulls(len(found), pa.string())
    return pc.if_else(pc.match_substring_regex(found, _UNTIDY), None, found)


def failed_tasks(errors: pa.ChunkedArray) -> dict[str, Mask]:
    """Per task, the rows whose errors say that it failed."""
    rows, items = explode(errors)
    stages = field_strings(items, "stage")
    out = {task: np.zeros(len(errors), dtype=np.bool_) for task in schema.TASKS}
    for task, marks in out.items():
        marks[rows[stages == task]] = True
    return out


def add_counts(counter: Counter[str], values: pa.ChunkedArray | pa.Array) -> None:
    """Adds how often each value occurs; nulls are left out."""
    for entry in values.drop_null().value_counts().to_pylist():
        counter[entry["values"]] += entry["counts"]


def policy_names(rows: pa.Table) -> pa.Array | pa.ChunkedArray:
    """(N,) ``name version (digest)`` of each row's policy, as :attr:`Policy.full_name`; null where there is none.

    The digest by its beginning: somebody may change a policy and leave its version as it was.

    Args:
        rows: with the columns :data:`POLICY_COLUMNS`.
    """
    name, version, digest = (rows[column] for column in POLICY_COLUMNS)
    shown = pc.binary_join_element_wise("(", pc.utf8_slice_codeunits(digest, 0, 12), ")", "")
    return pc.binary_join_element_wise(name, version, shown, " ")


def unseen_frames(errors: pa.ChunkedArray | pa.Array) -> Mask:
    """The rows whose errors say that some frames were not looked at."""
    rows, items = explode(errors)
    marks = np.zeros(len(errors), dtype=np.bool_)
    marks[rows[field_strings(items, "class") == RowErrorClass.FRAMES_UNSEEN]] = True
    return marks
