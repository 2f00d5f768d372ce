"""A manifest of many files: a folder or a prefix of them, as Spark and warehouses write tables."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from vlmflow.errors import SourceError
from vlmflow.sources.parquet_rows import is_damage
from vlmflow.sources.tables import TableFile, line_of, portable_schema, to_portable
from vlmflow.storage import access_error
from vlmflow.workspace import in_our_words

FORMATS = (".parquet", ".csv", ".jsonl", ".ndjson", ".json")
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TABLES = (*FORMATS, *(f"{name}{packed}" for name in FORMATS[1:] for packed in _PACKED))  # how manifest files are called
_PIECE_BYTES = 4 * 1024 * 1024
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_REMEDY = "Write all values of a column, in every file, as one type."


class Part(NamedTuple):
    """One file.

    Attributes:
        name: of the file, for messages.
        below: its path below the folder.
    """

    table: TableFile
    name: str
    below: str


def unpacked(path: Path, name: str, folder: Callable[[], Path]) -> tuple[Path, str]:
    """A manifest file without the compression that the end of its name tells, and its name without that.

    Args:
        folder: gives one to write it to, if it has any.

    Raises:
        SourceError: it is damaged.
        TransientError: it cannot be read.
        WorkspaceError: there is no room for it.
    """
    stem, extension = os.path.splitext(name)  # noqa: PTH122 (the name is a uri)
    packing = _PACKED.get(extension.lower())
    if packing is None:
        return path, name
    try:
        file = pa.OSFile(str(path))
    except OSError as error:
        raise access_error(error, name) from error
    plain = folder() / f"plain-{uuid.uuid4().hex}"
    with file, pa.CompressedInputStream(file, packing) as stream, in_our_words(), plain.open("wb") as copy:
        while piece := _read(stream, name):
            copy.write(piece)
    return plain, stem


def _read(stream: pa.CompressedInputStream, name: str) -> bytes:
    try:
        return bytes(stream.read(_PIECE_BYTES))
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise access_error(error, name) from error
        message = f"{name} is not compressed as its name says, or is damaged: {line_of(error)}"
        raise SourceError(message, remedy="Write it again.") from error


def format_of(name: str) -> str:
    """The extension of a manifest file, without that of its compression."""
    stem, extension = os.path.splitext(name.lower())  # noqa: PTH122
    return os.path.splitext(stem)[1] if extension in _PACKED else extension  # noqa: PTH122


class FilesTable:
    """The rows of several files, one after the other, under all the columns that any of them has.

    What a file lacks is null there, and numbers are as wide as the widest. Folders named ``column=value``, as Hive and
    Spark write partitions, give their files a column of texts.

    Args:
        name: of the folder, for messages.
        exact: columns that are written out, as keys are: of one type in all files, so that equal values stay equal.
    """

    def __init__(self, name: str, parts: Sequence[Part], exact: frozenset[str]) -> None:
        self._name, self._parts, self._exact = name, parts, exact

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns; see :class:`vlmflow.sources.tables.TableFile`."""
        found = pa.schema([])
        for part in self._parts:
            held = part.table.schema
            folders = [(name, pa.string()) for name in _of_folders(part) if name not in held.names]
            own = pa.schema([*held, *pa.schema(folders)])
            try:
                found = pa.unify_schemas([found, own], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
                message = f"{part.name}: its columns do not fit those of the files before it: {line_of(error)}"
                raise SourceError(message, remedy=_REMEDY) from error
        return portable_schema(found, self._name)

    def batches(self) -> Iterator[pa.Table]:
        """Yields the rows of each file."""
        kinds: dict[str, pa.DataType] = {}
        for part in self._parts:
            folders = _of_folders(part)
            for rows in part.table.batches():
                for name in self._exact & set(rows.column_names):
                    kind = rows.schema.field(name).type
                    if not pa.types.is_null(kind) and kinds.setdefault(name, kind) != kind:
                        message = f"{part.name}: column {name} is {kind}, and {kinds[name]} in the files before it"
                        raise SourceError(message, remedy=_REMEDY)
                columns = [self._column(field, rows, part, folders) for field in self.schema]
                yield pa.table(columns, names=self.schema.names)

    def _column(
        self, field: pa.Field, rows: pa.Table, part: Part, folders: dict[str, str | None]
    ) -> pa.Array | pa.ChunkedArray:
        if field.name not in rows.column_names:
            value = folders.get(field.name)
            return pa.nulls(rows.num_rows, field.type) if value is None else pa.repeat(value, rows.num_rows)
        column = rows[field.name]
        if column.type == field.type or field.name in self._exact:
            return column
        return to_portable(rows.select([field.name]), pa.schema([field]), part.name)[field.name]


def _of_folders(part: Part) -> dict[str, str | None]:
    """The columns that the names of a file's folders give."""
    pairs = [folder.partition("=") for folder in part.below.split("/")[:-1]]
    return {unquote(name): None if value == _NO_VALUE else unquote(value) for name, sign, value in pairs if sign}
