"""Tables that people filled in: Parquet, and CSV as spreadsheets save it."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vlmflow.errors import CalibrationError, ReviewError

_DELIMITERS = (",", ";", "\t")  # a spreadsheet writes that of its country
_MAX_HEADER_BYTES = 1 << 20


def read_verdict_table(
    path: Path, texts: Collection[str], error_class: type[ReviewError | CalibrationError]
) -> pa.Table:
    """Reads a Parquet or CSV file; its columns are called in lower case and without blanks around, as ours are.

    Args:
        texts: columns that are used, beside `weight`. In CSV they are not guessed to be anything but texts.

    Raises:
        ReviewError, CalibrationError: the file cannot be read, or has a column that is used twice.
    """
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path, texts)
    except (OSError, pa.ArrowException, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "Name a Parquet file, or a CSV file in UTF-8 with a line of columns: spreadsheets call it CSV UTF-8."
        raise error_class(f"{path} cannot be read: {reason}", remedy=remedy) from error
    names = [_plain(name) for name in table.column_names]
    twice = [name for name in (*texts, "weight") if names.count(name) > 1]
    if twice:
        raise error_class(f"{path}: the column {twice[0]} stands twice", remedy="Keep one of them.")
    return table.rename_columns(names)


def _read_csv(path: Path, texts: Collection[str]) -> pa.Table:
    with path.open("rb") as file:
        header = file.readline(_MAX_HEADER_BYTES).decode("utf-8-sig", "replace").splitlines()[:1]
    heads = {delimiter: next(csv.reader(header, delimiter=delimiter), []) for delimiter in _DELIMITERS}
    delimiter = max(_DELIMITERS, key=lambda one: sum(_plain(name) in texts for name in heads[one]))
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in heads[delimiter] if _plain(name) in texts},
            decimal_point="," if delimiter == ";" else ".",  # where the comma parts no cells it parts numbers
        ),
    )


def _plain(name: str) -> str:
    return name.strip().lower()
