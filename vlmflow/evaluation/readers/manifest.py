"""Any table with a column of images and columns of truth: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.where import mask_where
from vlmflow.errors import ConfigError, EvaluationError
from vlmflow.evaluation.dataset import Dataset, EvaluationTask, table_of
from vlmflow.evaluation.metrics.vqa import normalize_answer
from vlmflow.evaluation.readers.options import ReadOptions
from vlmflow.paths import is_file
from vlmflow.sources.base import texts
from vlmflow.sources.tables import open_table
from vlmflow.sources.uris import normalise_uri, resolve
from vlmflow.storage import parse_address

# How a list begins, JSON's or Python's, that cannot be read: titles such as "[Sale] Shoe" or "[2024] Shoe" are none.
_LIST = re.compile(r"""\s*\[\s*(["'{\[]|$|(-?[\d.]+|null|None)\s*(,|\]?\s*$))""")
# What each task reads, and the columns that are taken for it where --column names none.
_ROLES: dict[EvaluationTask, dict[str, tuple[str, ...]]] = {
    "retrieval": {"captions": ("captions", "caption", "title", "text")},
    "caption": {"captions": ("captions", "caption", "title", "text")},
    "answer": {
        "question": ("question",),
        "answers": ("answers", "answer"),
        "question_id": ("question_id",),
        "question_type": ("question_type",),
        "answer_type": ("answer_type",),
    },
    "zeroshot": {"class": ("class", "label")},
    "match": {"text": ("text", "title", "caption"), "match": ("match",), "mismatch": ("mismatch",)},
    "moderate": {"labels": ("labels",), "flag": ("flag",)},
}
# Of each group one column at least must be there.
_NEEDED: dict[EvaluationTask, tuple[tuple[str, ...], ...]] = {
    "retrieval": (("captions",),),
    "caption": (("captions",),),
    "answer": (("question",), ("answers",)),
    "zeroshot": (("class",),),
    "match": (("text",), ("match", "mismatch")),
    "moderate": (("labels", "flag"),),
}
_NO_TEXT = (dict, list, bytes)
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_manifest(task: EvaluationTask, path: Path, options: ReadOptions) -> Dataset:
    """Reads a table, joined with a table of truth if there is one.

    Raises:
        EvaluationError: a column is absent, a value cannot be what it should be, the join is not one to one, or an
            option says nothing of tables.
    """
    options.check_only(("images", "truth", "on", "where", "columns"), str(path), "tables")
    if options.on is not None and options.truth is None:
        raise EvaluationError(f"--on {options.on} without --truth", remedy="Name the table to join, or leave it out.")
    table, truth, differing = _load(path), options.truth, dict[str, str]()
    if truth is not None:
        table, differing = _joined(table, path, _load(truth), truth, options.on)
    if options.where is not None:
        table = _filtered(table, options.where, path)
    found = _roles(task, table, options.columns, path)
    for role, column in found.items():
        if role != "uri" and column in differing:  # whichever is not meant would make another figure
            raise EvaluationError(
                f"{path} and {truth} differ in their columns {column}: {differing[column]}",
                remedy=f"Rename one of them, and name the one that is meant with --column {role}=NAME.",
            )
    given = {role: table[name].to_pylist() for role, name in found.items()}
    parent = parse_address(options.images if options.images is not None else str(path.parent))
    for row, uri in enumerate(given["uri"]):
        if not isinstance(uri, str) or not uri.strip():
            raise EvaluationError(f"{path}, row {row + 1}: {found['uri']} is empty", remedy="Leave the row out.")
    given["uri"] = [normalise_uri(uri) for uri in resolve(given["uri"], parent)]
    name = path.name if truth is None else f"{path.name} with {truth.name}"
    return _BUILDERS[task](_Rows(given, found, str(path)), name)


class _Rows:
    """Values by what they are for, and where they came from."""

    def __init__(self, values: dict[str, list[Any]], columns: dict[str, str], path: str) -> None:
        self.values, self._columns, self._path = values, columns, path

    def __len__(self) -> int:
        return len(self.values["uri"])

    def has(self, role: str) -> bool:
        return role in self.values

    def text(self, role: str, row: int) -> str:
        found = self.values[role][row]
        if found is None or not str(found).strip():
            raise self.wrong(role, row, "is empty")
        return self._written(role, row)

    def optional(self, role: str, row: int) -> str | None:
        found = self.values[role][row] if self.has(role) else None
        return None if found is None else self._written(role, row)

    def flag(self, role: str, row: int) -> bool:
        found = self.values[role][row]
        if isinstance(found, bool):
            return found
        flag = _FLAGS.get(str(found).strip().lower())
        if flag is None:
            raise self.wrong(role, row, "is neither true nor false")
        return flag

    def several(self, role: str, row: int, separator: str | None) -> list[str]:
        """A list, a JSON list in a string, or what stands between separators."""
        found = self.values[role][row]
        if isinstance(found, str) and found.lstrip().startswith("["):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError) as error:
                if _LIST.match(found):
                    raise self.wrong(role, row, "is no JSON list") from error
        if found is None:
            found = []
        elif not isinstance(found, list):
            found = found.split(separator) if separator and isinstance(found, str) else [found]
        if any(isinstance(item, (*_NO_TEXT, bool)) for item in found):
            raise self.wrong(role, row, "holds no texts")
        return [text for text in (str(item).strip() for item in found if item is not None) if text]

    def _written(self, role: str, row: int) -> str:
        found = self.values[role][row]
        if isinstance(found, _NO_TEXT):
            raise self.wrong(role, row, "is no text")
        return str(found)

    def wrong(self, role: str, row: int, what: str) -> EvaluationError:
        shown = str(self.values[role][row])[:60]
        return EvaluationError(
            f"{self._path}, row {row + 1}: {self._columns[role]} {what}: {shown!r}",
            remedy="Mend it, leave the row out with --where, or name another column with --column.",
        )


def _captions(task: EvaluationTask) -> Callable[[_Rows, str], Dataset]:
    def build(rows: _Rows, name: str) -> Dataset:
        grouped: dict[str, list[str]] = {}
        for row, uri in enumerate(rows.values["uri"]):
            said = rows.several("captions", row, None)
            if not said:
                raise rows.wrong("captions", row, "is empty")
            grouped.setdefault(uri, []).extend(said)
        return Dataset(task, name, table_of(task, {"uri": list(grouped), "captions": list(grouped.values())}))

    return build


def _answers(rows: _Rows, name: str) -> Dataset:
    grouped: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for row, uri in enumerate(rows.values["uri"]):
        number = rows.optional("question_id", row) or str(row + 1)
        if number in seen:
            raise rows.wrong("question_id", row, "stands twice")
        seen.add(number)
        answers = rows.several("answers", row, ";")
        if not answers:
            raise rows.wrong("answers", row, "is empty")
        question = {
            "question_id": number,
            "question": rows.text("question", row),
            "answers": [normalize_answer(answer) for answer in answers],
            "question_type": rows.optional("question_type", row),
            "answer_type": rows.optional("answer_type", row),
        }
        grouped.setdefault(uri, []).append(question)
    return Dataset("answer", name, table_of("answer", {"uri": list(grouped), "questions": list(grouped.values())}))


def _zeroshot(rows: _Rows, name: str) -> Dataset:
    classes: dict[str, str] = {}
    for row, uri in enumerate(rows.values["uri"]):
        found = rows.text("class", row)
        if classes.setdefault(uri, found) != found:
            raise rows.wrong("class", row, f"was {classes[uri]!r} further up, for the same image")
    table = table_of("zeroshot", {"uri": list(classes), "class": list(classes.values())})
    return Dataset("zeroshot", name, table, classes=tuple(sorted(set(classes.values()))))


def _match(rows: _Rows, name: str) -> Dataset:
    role = "match" if rows.has("match") else "mismatch"
    pairs: dict[tuple[str, str], bool] = {}
    for row, uri in enumerate(rows.values["uri"]):
        fits = rows.flag(role, row) == (role == "match")
        text = rows.text("text", row)
        if pairs.setdefault((uri, text), fits) != fits:
            raise rows.wrong(role, row, "contradicts an earlier row of the same image and text")
    table = table_of(
        "match",
        {
            "uri": [uri for uri, _ in pairs],
            "key": [digest_of(text) for _, text in pairs],
            "text": [text for _, text in pairs],
            "match": list(pairs.values()),
        },
    )
    return Dataset("match", name, table)


def _moderate(rows: _Rows, name: str) -> Dataset:
    found: dict[str, tuple[list[str] | None, bool]] = {}
    for row, uri in enumerate(rows.values["uri"]):
        labels = sorted(set(rows.several("labels", row, ";"))) if rows.has("labels") else None
        flag = rows.flag("flag", row) if rows.has("flag") else bool(labels)
        if found.setdefault(uri, (labels, flag)) != (labels, flag):
            raise rows.wrong("flag" if rows.has("flag") else "labels", row, "contradicts an earlier row of the image")
    labels_, flags = [labels for labels, _ in found.values()], [flag for _, flag in found.values()]
    return Dataset("moderate", name, table_of("moderate", {"uri": list(found), "labels": labels_, "flag": flags}))


_BUILDERS: dict[EvaluationTask, Callable[[_Rows, str], Dataset]] = {
    "retrieval": _captions("retrieval"),
    "caption": _captions("caption"),
    "answer": _answers,
    "zeroshot": _zeroshot,
    "match": _match,
    "moderate": _moderate,
}


def _roles(task: EvaluationTask, table: pa.Table, columns: Mapping[str, str], path: Path) -> dict[str, str]:
    """By what is needed, the column that holds it."""
    known = {"uri": ("uri",), **_ROLES[task]}
    there = ", ".join(table.column_names) or "none"
    unknown = next((role for role in columns if role not in known), None)
    if unknown is not None:
        raise EvaluationError(f"--column {unknown}=...: {task} reads {', '.join(known)}", remedy="Use one of these.")
    found: dict[str, str] = {}
    for role, defaults in known.items():
        name = columns.get(role) or next((name for name in defaults if name in table.column_names), None)
        if name is not None and name not in table.column_names:
            raise EvaluationError(f"{path} has no column {name}; it has {there}", remedy="Name another with --column.")
        if name is not None:
            found[role] = name
    for group in (("uri",), *_NEEDED[task]):
        if not any(role in found for role in group):
            remedy = f"Say which column it is: --column {group[0]}=NAME."
            raise EvaluationError(f"{path} has no column for {' or '.join(group)}; it has {there}", remedy=remedy)
    return found


def _load(path: Path) -> pa.Table:
    if not is_file(path):
        raise EvaluationError(f"{path} does not exist", remedy="Name a table on this machine.")
    file = open_table(path, path.name)
    return pa.concat_tables([file.schema.empty_table(), *file.batches()])


def _joined(
    table: pa.Table, path: Path, truth: pa.Table, truth_path: Path, on: str | None
) -> tuple[pa.Table, dict[str, str]]:
    """The table with the columns that the truth has besides; and of those of both the ones that differ, and in what."""
    shared = [name for name in table.column_names if name in truth.column_names]
    if on is None and len(shared) != 1:
        found = f"share the columns {', '.join(shared)}" if shared else "share no column"
        raise EvaluationError(f"{path} and {truth_path} {found}", remedy="Name the one to join by with --on.")
    by = on or shared[0]
    if by not in shared:
        raise EvaluationError(f"--on {by}: not a column of both tables", remedy=f"They share: {', '.join(shared)}.")
    # As texts: of the two files one may know numbers, and the other, such as CSV, texts alone.
    keys, known = texts(table[by], f"{path}: column {by}"), texts(truth[by], f"{truth_path}: column {by}")
    if len(known.unique()) < len(known):
        raise EvaluationError(f"{truth_path} holds one value of {by} twice", remedy="Keep one row for each.")
    rows = pc.index_in(keys, value_set=known, skip_nulls=True)
    if rows.null_count:
        missing = sorted(str(key) for key in keys.filter(rows.is_null()).to_pylist())
        raise EvaluationError(
            f"{truth_path} says nothing of {by} {missing[0]} and {len(missing) - 1:,} more rows",
            remedy=f"Add them, or leave the rows out of {path.name}.",
        )
    differing: dict[str, str] = {}
    # Not Arrow's own join, which takes no lists.
    for name in truth.column_names:
        if name not in shared:
            table = table.append_column(truth.schema.field(name), truth[name].take(rows))
        elif name != by:
            pairs = zip(table[name].to_pylist(), truth[name].take(rows).to_pylist(), strict=True)
            first = next((pair for pair in pairs if pair[0] != pair[1]), None)
            if first is not None:
                differing[name] = ", ".join(repr(str(value)[:60]) for value in first)
    return table, differing


def _filtered(table: pa.Table, where: str, path: Path) -> pa.Table:
    try:
        return table.filter(pa.array(mask_where(table, where)))
    except ConfigError as error:
        remedy = f"Write a condition over the columns of {path.name}: {', '.join(table.column_names)}."
        raise EvaluationError(str(error), remedy=remedy) from error
