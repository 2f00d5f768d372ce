"""What every source is: a listing of image references, and a reader that fetches their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import RowErrorClass, SourceError
from vlmflow.schema import REFERENCE, with_source
from vlmflow.sources.uris import ids_of_normalised

# Rows of a batch of references: large enough for Arrow to pay, small enough to stay a few megabytes.
BATCH_ROWS = 10_000


_OWN_COLUMNS = ("key_column", "text_column", "questions_column")  # of which references have columns of their own


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one image, or why there are none.

    Attributes:
        data: None if they could not be read.
        object_version: of the very bytes read; None where the server tells none.
        error_class: None if they were read.
        message: empty if they were read; holds neither a local path nor a signature.
        validator: ETag or Last-Modified of the very bytes read, if a server may be asked by it whether it has them yet.
        unmodified: what is known of the bytes, as ``schema.READ``, where the server says so; then there are no data.
    """

    data: bytes | None
    object_version: str | None
    error_class: RowErrorClass | None
    message: str
    validator: str | None = None
    unmodified: Mapping[str, Any] | None = None


class Reader(Protocol):
    """Fetches images in a worker. Picklable: its clients are opened where it is used."""

    def read(self, refs: pa.Table) -> list[Fetched]:
        """Reads one image for each reference, in order, several at a time.

        Args:
            refs: with the columns of ``schema.REFERENCE``. Where ``previous_read`` of ``schema.PLANNED`` is among
                them, and says of what was read before, http servers are asked whether they still have it.

        Raises:
            StoreLostError: the store is gone or refuses everything; never for one object.
        """
        ...


class Source(Protocol):
    """Where images come from."""

    @property
    def columns(self) -> pa.Schema:
        """The caller's columns that the references carry in ``source``; empty if there are none.

        Raises:
            SourceError: what describes them cannot be read.
            StorageAccessError: the store refused, or is not there.
        """
        ...

    @property
    def version(self) -> str | None:
        """Of the one file that the source is, as it was when :meth:`list` read it; None: it is no such file."""
        ...

    @property
    def num_repeated(self) -> int:
        """Listings of an image that :meth:`list` has left out, because it gave the image before."""
        ...

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the image references in batches, each image once; opens no image.

        Raises:
            SourceError: the source does not hold what was said of it.
            EmptySourceError: nothing is listed, and ``allow_empty`` was not given.
            StorageAccessError: the store refused, or is not there.
            TransientError: the store is throttling or out of reach.
        """
        ...

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        ...


def own_columns(rows: pa.Table, config: SourceConfig, name: str) -> dict[str, pa.Array]:
    """What references take of the caller's columns: ``key``, ``text`` and ``questions``, of those that are named.

    Args:
        name: of the source, for messages.

    Raises:
        SourceError: a column holds something else.
    """
    given: dict[str, pa.Array] = {}
    for own, column in (("key", config.key_column), ("text", config.text_column)):
        if column is not None:
            given[own] = texts(rows[column], f"{name}: column {column}")
    if config.questions_column is not None:
        given["questions"] = _questions(rows[config.questions_column], f"{name}: column {config.questions_column}")
    return given


def flat(column: pa.ChunkedArray) -> pa.Array:
    """One array of a column of one chunk or none."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def texts(column: pa.ChunkedArray, what: str) -> pa.Array:
    """A column as strings: numbers and times are written out, bytes are taken for UTF-8.

    Args:
        what: names the column, for messages.

    Raises:
        SourceError: it holds lists, structs, or bytes that are not UTF-8.
    """
    try:
        strings = flat(column).cast(pa.string())
        strings.validate(full=True)  # Arrow takes strings of a Parquet file as they are
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        message = f"{what} ({column.type}) holds no texts in UTF-8"
        raise SourceError(message, remedy="Store it as strings.") from error
    return strings


def check_named(config: SourceConfig, columns: Sequence[str], name: str) -> None:
    """Makes sure that the source has the caller's columns that the job names.

    Raises:
        SourceError: one is not there.
    """
    named = [(setting, getattr(config, setting)) for setting in (*_OWN_COLUMNS, "found_text_column")]
    for setting, column in (*named, *(("columns", column) for column in config.columns or ())):
        if column is not None and column not in columns:
            there = ", ".join(columns) or "none"
            remedy = f"Name another with source.{setting}, or leave it out."
            raise SourceError(f"{name} has no column {column}; it has {there}", remedy=remedy)


def is_kept(config: SourceConfig, column: str) -> bool:
    """Whether rows keep a column of the caller's."""
    return config.columns is None or column in config.columns


def is_read(config: SourceConfig, column: str) -> bool:
    """Whether a column of the caller's is read at all: rows keep it, or references are made of it."""
    own = (config.uri_column, *(getattr(config, setting) for setting in _OWN_COLUMNS))
    return is_kept(config, column) or column in own


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists, of whatever length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def source_struct(rows: pa.Table, columns: pa.Schema) -> pa.StructArray | None:
    """The caller's columns as one struct column; None if there are none."""
    if len(columns) == 0:
        return None
    values = [flat(rows[field.name]).cast(field.type) for field in columns]
    return pa.StructArray.from_arrays(values, fields=list(columns))


def _questions(column: pa.ChunkedArray, what: str) -> pa.Array:
    """Lists of questions from a column of lists, or of texts with one question a line; null where there is none."""
    kind = column.type
    of_each = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_string(of_each) or pa.types.is_null(of_each)):
        raise SourceError(f"{what} is {kind}", remedy="Store questions as texts, one a line, or as lists of texts.")
    asked = []
    for value in column.to_pylist():
        questions = value.splitlines() if isinstance(value, str) else value or []
        asked.append([question.strip() for question in questions if question and question.strip()] or None)
    return pa.array(asked, pa.list_(pa.string()))


def reference_batch(columns: Mapping[str, pa.Array], source: pa.StructArray | None = None) -> pa.RecordBatch:
    """Completes columns to a batch of ``schema.REFERENCE``: computes ``image_id``, leaves null what is not given.

    Args:
        columns: ``uri`` at least, normalised; ``locator`` where it differs from it.
        source: the caller's columns.
    """
    uris = columns["uri"]
    keys = columns.get("key")
    given = {
        "image_id": pa.array(
            ids_of_normalised(uris.to_pylist(), None if keys is None else keys.to_pylist()), pa.string()
        ),
        "locator": uris,
        **columns,
    }
    schema = with_source(REFERENCE, None if source is None else pa.schema(list(source.type)))
    arrays = [given[field.name] if field.name in given else pa.nulls(len(uris), field.type) for field in REFERENCE]
    arrays = [array.cast(field.type) for array, field in zip(arrays, REFERENCE, strict=True)]
    return pa.RecordBatch.from_arrays(arrays if source is None else [*arrays, source], schema=schema)
