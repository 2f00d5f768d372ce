"""What filters, counts and orders need of every row: a few numbers each, read once per file of the table.

N: rows, numbered as in :class:`vlmflow.search.live.LiveRows`. A file never changes, so a new version of the table costs
the reading of its new files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.catalog.columns import flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import of_list
from vlmflow.catalog.log import DataFile
from vlmflow.catalog.masks import Mask, is_valid
from vlmflow.catalog.read import read_each
from vlmflow.catalog.rows import POLICY_COLUMNS, error_classes, policy_names
from vlmflow.moderation.queue import threshold_gaps

DECISIONS = ("allow", "review", "block")
VERDICTS = ("nobody", "person", "list")
# Facets of which every row has one value, and those of which it may have several: labels that flag it, error classes.
FACETS = ("decision", "status", "verdict", "policy", "date")
LISTS = ("label", "error")
_LABEL_FIELDS = (
    "label",
    "category",
    "score",
    "probability",
    "review_threshold",
    "block_threshold",
    "decision",
)
_COLUMNS = [
    "image_id",
    "content_hash",
    "decision",
    "status",
    "errors",
    "verdict",
    *POLICY_COLUMNS,
    "text_itm",
    "text_itc",
    *(f"labels.list.element.{name}" for name in _LABEL_FIELDS),
]
_FIELDS = [schema.IMAGES.field(name) for name in dict.fromkeys(name.partition(".")[0] for name in _COLUMNS)]

Codes: TypeAlias = NDArray[np.int32]
Pairs: TypeAlias = tuple[NDArray[np.int64], Codes]  # rows, and the numbers of values


@dataclass(frozen=True, eq=False)
class FileFacts:
    """Of the rows of one file.

    Attributes:
        codes: by facet, the number of each row's value among the names of the facet.
        is_judgeable: rows whose bytes were read once: a verdict can be bound to them.
        gap: how near the nearest label is to one of its thresholds; infinite without scores.
        itm: probability that the caller's text matches; infinite without one.
        itc: cosine of that text and the image; infinite without one.
        pairs: by facet of those with several values, the pairs of a row and a value, each once.
    """

    codes: dict[str, Codes]
    is_judgeable: Mask
    gap: NDArray[np.float32]
    itm: NDArray[np.float32]
    itc: NDArray[np.float32]
    pairs: dict[str, Pairs]


class Names:
    """The values of a facet as numbers, in the order of their first mention. They only ever become more."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        self.codes: dict[str, int] = {name: code for code, name in enumerate(known)}

    def __len__(self) -> int:
        return len(self.codes)

    def of(self, column: pa.Array | pa.ChunkedArray) -> Codes:
        """(N,) the number of each value; null is the value of the empty text."""
        coded = pc.dictionary_encode(pc.fill_null(flat(column).cast(pa.string()), ""))
        numbers = [self.codes.setdefault(name, len(self.codes)) for name in coded.dictionary.to_pylist()]
        codes: Codes = np.array([*numbers, 0], np.int32)[coded.indices.to_numpy(zero_copy_only=False)]
        return codes


class FactReader:
    """Reads facts, and keeps those of files that are still live."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._held: dict[str, FileFacts] = {}
        self._names = {facet: Names() for facet in (*FACETS, *LISTS)}
        self._names["decision"] = Names(DECISIONS)
        self._names["verdict"] = Names(VERDICTS)

    def read(self, files: Sequence[DataFile]) -> Facts:
        """The facts of the rows of these files, in their order."""
        new = [file for file in files if file.path not in self._held]
        held = {file.path: self._held[file.path] for file in files if file.path in self._held}
        for file, rows in read_each(self._folder, "images", new, _COLUMNS, ahead=2):
            held[file.path] = self._of(rows, file)
        self._held = held
        names = {facet: tuple(found.codes) for facet, found in self._names.items()}
        return _joined([held[file.path] for file in files], names)

    def _of(self, rows: pa.Table, file: DataFile) -> FileFacts:
        count = rows.num_rows
        for field in _FIELDS:
            if field.name not in rows.column_names:  # of a file older than the column
                rows = rows.append_column(field, pa.nulls(count, field.type))
        date = pa.repeat(file.ingest_date.isoformat(), count)
        values = {"decision": rows["decision"], "status": rows["status"], "policy": policy_names(rows), "date": date}
        codes = {facet: self._names[facet].of(column) for facet, column in values.items()}
        verdict = flat(rows["verdict"])
        codes["verdict"] = np.where(of_list(verdict), 2, is_valid(verdict)).astype(np.int32)
        labels = flat(rows["labels"])
        items = pc.list_flatten(labels)
        flags = pc.fill_null(pc.not_equal(pc.struct_field(items, "decision"), "allow"), True)
        name = pc.binary_join_element_wise(
            pc.fill_null(pc.struct_field(items, "category"), ""), pc.fill_null(pc.struct_field(items, "label"), ""), "/"
        )
        flag_rows = np.asarray(pc.list_parent_indices(labels).filter(flags), np.int64)
        pairs = {
            "label": self._pairs("label", flag_rows, name.filter(flags)),
            "error": self._pairs("error", *_classes(rows["errors"])),
        }
        return FileFacts(
            codes=codes,
            is_judgeable=is_valid(rows["content_hash"]),
            gap=threshold_gaps(rows).astype(np.float32),
            itm=_scores(rows["text_itm"]),
            itc=_scores(rows["text_itc"]),
            pairs=pairs,
        )

    def _pairs(self, facet: str, rows: NDArray[np.int64], values: pa.Array) -> Pairs:
        """Each pair once: prompts and detectors may flag a row for the same label."""
        codes = self._names[facet].of(values)
        count = max(1, len(self._names[facet]))
        pairs = np.unique(rows * count + codes)
        return pairs // count, (pairs % count).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Facts:
    """Of all rows of one version; see :class:`FileFacts`.

    Attributes:
        names: by facet, the values in the order of their numbers.
        match: how well the caller's text fits, by the matching head; where no row has that, by the cosine.
    """

    names: dict[str, tuple[str, ...]]
    codes: dict[str, Codes]
    is_judgeable: Mask
    gap: NDArray[np.float32]
    match: NDArray[np.float32]
    pairs: dict[str, Pairs]

    def __len__(self) -> int:
        return len(self.gap)

    def with_verdicts(self, changes: Mapping[int, tuple[str, str]]) -> Facts:
        """The same with some rows under other verdicts: by row, the decision and whose it is."""
        if not changes:
            return self
        codes = dict(self.codes)
        at = np.fromiter(changes, np.int64)
        for number, (facet, known) in enumerate((("decision", DECISIONS), ("verdict", VERDICTS))):
            codes[facet] = codes[facet].copy()
            codes[facet][at] = [known.index(change[number]) for change in changes.values()]
        return Facts(**{**vars(self), "codes": codes})

    def mask(self, facet: str, values: Sequence[str]) -> Mask:
        """(N,) rows that have one of these values."""
        names = self.names[facet]
        wanted = [names.index(value) for value in values if value in names]
        if facet in self.pairs:
            rows, codes = self.pairs[facet]
            mask = np.zeros(len(self), np.bool_)
            mask[rows[np.isin(codes, wanted)]] = True
            return mask
        marks = np.zeros(len(names) + 1, np.bool_)
        marks[wanted] = True
        return np.asarray(marks[self.codes[facet]], np.bool_)

    def counts(self, facet: str, among: Mask | None) -> dict[str, int]:
        """How many rows have each value, of those marked; values that none has are left out."""
        if facet in self.pairs:
            rows, codes = self.pairs[facet]
            codes = codes if among is None else codes[among[rows]]
        else:
            codes = self.codes[facet] if among is None else self.codes[facet][among]
        found = np.bincount(codes, minlength=len(self.names[facet])).tolist()
        return {name: count for name, count in zip(self.names[facet], found, strict=False) if count}


def _scores(column: pa.ChunkedArray) -> NDArray[np.float32]:
    values = pc.fill_null(flat(column).cast(pa.float32()), np.inf).to_numpy(zero_copy_only=False)
    scores: NDArray[np.float32] = np.nan_to_num(values, nan=np.inf, posinf=np.inf)
    return scores


def _joined(parts: Sequence[FileFacts], names: dict[str, tuple[str, ...]]) -> Facts:
    starts = np.cumsum([0, *(len(part.gap) for part in parts)])

    def join(values: Iterator[NDArray[Any]], dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *values])

    match = join((part.itm for part in parts), np.float32)
    return Facts(
        names=names,
        codes={facet: join((part.codes[facet] for part in parts), np.int32) for facet in FACETS},
        is_judgeable=join((part.is_judgeable for part in parts), np.bool_),
        gap=join((part.gap for part in parts), np.float32),
        match=match if np.isfinite(match).any() else join((part.itc for part in parts), np.float32),
        pairs={
            facet: (
                join((part.pairs[facet][0] + start for part, start in zip(parts, starts, strict=False)), np.int64),
                join((part.pairs[facet][1] for part in parts), np.int32),
            )
            for facet in LISTS
        },
    )


def _classes(errors: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """The classes of each row's errors; of a row without one the empty text."""
    rows, classes = error_classes(errors)
    without = np.setdiff1d(np.arange(len(errors)), rows, assume_unique=False)
    return np.concatenate([rows, without]), pa.concat_arrays([classes, pa.array([""] * len(without), pa.string())])
