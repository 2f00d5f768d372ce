"""Review queues as files that people work in, and their verdicts back: Parquet, CSV, and JSON of Label Studio."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmflow.catalog.judged import LIST_PREFIX
from vlmflow.errors import ReviewError, SourceError
from vlmflow.files import put_file
from vlmflow.moderation.verdict_tables import read_verdict_table
from vlmflow.moderation.verdicts import NO_VALUE
from vlmflow.sources.uris import normalise_uri
from vlmflow.views_search import as_csv

DECISIONS = ("allow", "review", "block", "none")
_YES_NO = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
_TEXTS = ("image_id", "uri", "verdict", "label", "value", "reviewer", "reason", "at", "content_hash")
_SUFFIXES = (".parquet", ".csv", ".json")


@dataclass(frozen=True)
class Word:
    """What one person said of one image.

    Attributes:
        image: an image_id, or a normalised uri.
        at: None: the file does not say.
    """

    image: str
    decision: str | None
    label: str | None
    value: bool | None
    weight: float | None
    reviewer: str
    at: dt.datetime | None
    reason: str | None
    content_hash: str | None


def check_suffix(path: Path) -> None:
    """Refuses files of another kind.

    Raises:
        ReviewError: neither .parquet, .csv nor .json.
    """
    if path.suffix not in _SUFFIXES:
        raise ReviewError(f"{path}: neither .parquet, .csv nor .json", remedy="Name such a file.")


def write_queue(path: Path, queue: pa.Table) -> None:
    """Writes a queue: by its suffix as Parquet, CSV (no cell starts a formula), or tasks of Label Studio.

    Raises:
        ReviewError: another suffix, or the file cannot be written.
    """
    check_suffix(path)
    try:
        if path.suffix == ".parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(queue, sink)
            put_file(path, sink.getvalue().to_pybytes())
        elif path.suffix == ".csv":
            rows = ([row[name] for name in queue.column_names] for row in queue.to_pylist())
            put_file(path, as_csv(queue.column_names, rows))
        else:
            tasks = [{"data": {"image": row["uri"], **_filled(row)}} for row in queue.to_pylist()]
            put_file(path, json.dumps(tasks, indent=1, ensure_ascii=False))
    except OSError as error:
        raise ReviewError(f"{path}: {error.strerror}", remedy="Name another file.") from error


def read_words(path: Path, reviewer: str | None, now: dt.datetime) -> tuple[list[Word], Counter[str]]:
    """Reads verdicts; rows that nobody filled in are passed over, and what does not count is counted by reason.

    Columns: image_id or uri; verdict (allow, review, block, none), or label and value, or both; reviewer, at, reason,
    content_hash and weight where there are any. JSON: an export of Label Studio, whose choices are named ``verdict``
    and ``label``, and whose text is named ``reason``.

    Args:
        reviewer: of rows that name none.
        now: rows may not be of a later time.

    Raises:
        ReviewError: the file cannot be read, lacks a column, or holds a value that cannot be taken.
    """
    check_suffix(path)
    rows = _label_studio(path) if path.suffix == ".json" else _table(path).to_pylist()
    words, left_out = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        word = _word(f"{path}, row {number}", row, reviewer, now)
        if word is not None:
            words.append(word)
        if _text(row.get("label")) is not None and _text(row.get("value")) is None:
            left_out[NO_VALUE] += 1
    return words, left_out


def changed_at(path: Path, now: dt.datetime) -> dt.datetime:
    """When a file was last changed; not after ``now``, whatever the clock of its disk says."""
    return min(now, dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC))


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _table(path: Path) -> pa.Table:
    table = read_verdict_table(path, _TEXTS, ReviewError)
    names = table.column_names
    if not {"image_id", "uri"} & set(names) or not {"verdict", "value"} & set(names):
        raise ReviewError(
            f"{path}: has the columns {', '.join(names)}",
            remedy="Give image_id or uri, and verdict, or label and value: as `vlmflow review export` writes them.",
        )
    return table


def _label_studio(path: Path) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReviewError(f"{path} is no JSON file", remedy="Export from Label Studio as JSON.") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ReviewError(f"{path} holds no list of tasks", remedy="Export from Label Studio as JSON.")
    return [row for task in tasks for row in _task_rows(task)]


def _task_rows(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task's newest annotation that was not cancelled."""
    data = task.get("data") if isinstance(task.get("data"), dict) else {}
    annotations = [
        one for one in task.get("annotations") or [] if isinstance(one, dict) and not one.get("was_cancelled")
    ]
    if not annotations or not isinstance(data, dict):
        return []
    newest = max(annotations, key=lambda one: str(one.get("updated_at") or one.get("created_at") or ""))
    given: dict[str, list[str]] = {}
    for item in newest.get("result") or []:
        value = item.get("value") if isinstance(item, dict) else None
        if isinstance(value, dict):
            found = value.get("choices") or value.get("text") or []
            given.setdefault(str(item.get("from_name")), []).extend([found] if isinstance(found, str) else found)
    who = newest.get("completed_by")
    base = {
        **{name: data.get(name) for name in ("image_id", "uri", "content_hash", "weight")},
        "reviewer": who.get("email") or who.get("id") if isinstance(who, dict) else who,
        "at": newest.get("updated_at") or newest.get("created_at"),
        "reason": " ".join(map(str, given.get("reason", []))) or None,
    }
    rows = [base | {"verdict": verdict} for verdict in given.get("verdict", [])[:1]]
    return rows + [base | {"label": label, "value": "true"} for label in given.get("label", [])]


def _word(where: str, row: Mapping[str, Any], reviewer: str | None, now: dt.datetime) -> Word | None:
    texts = {name: _text(row.get(name)) for name in _TEXTS if name != "at"}
    decision, value = texts["verdict"], texts["value"]
    if decision is None and value is None:
        return None
    if decision is not None and decision.lower() not in DECISIONS:
        raise ReviewError(f"{where}: verdict {decision!r}", remedy=f"Write {', '.join(DECISIONS)}, or nothing.")
    if value is not None and (value.lower() not in _YES_NO or texts["label"] is None):
        raise ReviewError(
            f"{where}: label {texts['label']!r}, value {value!r}", remedy="Name a label, and true or false."
        )
    who = texts["reviewer"] or reviewer
    if who is None:
        raise ReviewError(f"{where}: no reviewer", remedy="Fill in the column reviewer, or give --reviewer.")
    if who.startswith(LIST_PREFIX):
        raise ReviewError(f"{where}: reviewer {who!r} is a list of known images", remedy="Name a person.")
    image = texts["image_id"]
    if image is None:
        if texts["uri"] is None:
            raise ReviewError(f"{where}: neither image_id nor uri", remedy="Fill one of them in.")
        try:
            image = normalise_uri(texts["uri"])
        except SourceError as error:
            raise ReviewError(f"{where}: {error}", remedy=error.remedy) from error
    return Word(
        image=image,
        decision=decision and decision.lower(),
        label=texts["label"] and texts["label"].rpartition("/")[2] if value is not None else None,
        value=None if value is None else _YES_NO[value.lower()],
        weight=_weight(where, row.get("weight")),
        reviewer=who,
        at=_time(where, row.get("at"), now),
        reason=texts["reason"],
        content_hash=texts["content_hash"],
    )


def _text(value: object) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _weight(where: str, value: object) -> float | None:
    text = _text(value)
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ReviewError(f"{where}: weight {value!r}", remedy="Write a number above 0, or nothing.")
    return weight


def _time(where: str, value: object, now: dt.datetime) -> dt.datetime | None:
    if value is None or value == "":
        return None
    if isinstance(value, dt.datetime):
        found = value
    else:
        try:
            found = dt.datetime.fromisoformat(str(value).strip())
        except ValueError as error:
            raise ReviewError(f"{where}: at {value!r}", remedy="Write a time as 2026-11-24T10:00:00Z.") from error
    found = found.replace(tzinfo=dt.UTC) if found.tzinfo is None else found.astimezone(dt.UTC)
    if found > now + dt.timedelta(minutes=5):
        raise ReviewError(f"{where}: at {value!r} is to come", remedy="A verdict of the future would beat all others.")
    return found
