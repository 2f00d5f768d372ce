"""What is wrong with a CSV file, and in which line. Arrow, which reads it, tells no line, and nothing of quotes."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path

from vlmflow.errors import SourceError

_MAX_FIELD_LETTERS = 1 << 24  # more than Arrow takes of a whole row
_BLOCK = 1 << 20  # of Arrow: of rows that are longer it takes some, as they happen to lie
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_quotes(path: Path, name: str) -> None:
    """Makes sure that every quote is closed where its value ends: else Arrow takes the rows behind for a text.

    Raises:
        SourceError: one is not.
    """
    line = 1
    try:
        for first, num_lines, _ in _rows(path, strict=True):
            line = first + num_lines  # of the next row
    except csv.Error as error:
        message = f"{name}, line {line}: a quote is not closed, or not where its value ends"
        raise SourceError(message, remedy='Close it, and write "" for a quote within quotes.') from error


def fault_of(path: Path, name: str, error: Exception) -> SourceError | None:
    """The first thing that keeps a CSV file from being read; None: it is none of those that are known here.

    Args:
        error: what Arrow says of it.
    """
    with path.open("rb") as file:
        if file.read(2) in _UTF_16:
            return SourceError(f"{name} is in UTF-16", remedy="Write it in UTF-8.")
    is_too_long = "straddl" in str(error)
    num_columns = 0
    try:
        for line, _, row in _rows(path, strict=False):
            if not row:
                continue
            where = f"{name}, line {line}"
            data = ",".join(row).encode("utf-8", "surrogateescape")
            if is_too_long and len(data) > _BLOCK:
                message = f"{where}: a row of {len(data):,} bytes, and {_BLOCK:,} are safe in a CSV file"
                return SourceError(message, remedy="Leave long texts out, or write the manifest as a .parquet file.")
            if not _is_utf_8(data):
                return SourceError(f"{where} is not in UTF-8", remedy="Write the file in UTF-8.")
            num_columns = num_columns or len(row)
            if len(row) != num_columns:
                message = f"{where}: {len(row)} fields, where the header has {num_columns}"
                return SourceError(message, remedy="Write as many in every row, and texts with commas in quotes.")
    except csv.Error:
        return None
    return None if num_columns else SourceError(f"{name} is empty", remedy="Write a header, with a column of uris.")


def _rows(path: Path, *, strict: bool) -> Iterator[tuple[int, int, list[str]]]:
    """Yields for each row its first line, how many it has, and its fields: none, if it has no letter."""
    csv.field_size_limit(_MAX_FIELD_LETTERS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows, before = csv.reader(file, strict=strict), 0
        for row in rows:
            yield before + 1, rows.line_num - before, row
            before = rows.line_num


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
