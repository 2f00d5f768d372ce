"""Conditions in SQL see rows and nothing else, and end."""

from __future__ import annotations

import threading
import time
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from vlmflow.catalog import where
from vlmflow.errors import ConditionError, ConfigError

ROWS = pa.table({"width": [1, 5, None]})


def test_rows_of_which_the_condition_is_true() -> None:
    assert where.mask_where(ROWS, "width > 2").tolist() == [False, True, False]


def test_a_condition_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_MAX_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"took more than 0.2 s"):
        where.mask_where(ROWS, "(SELECT count(*) FROM range(1000000000000) r(i) WHERE i % 7 = 3) > width")


@pytest.mark.parametrize(
    "condition",
    ["(SELECT count(*) FROM read_text('/etc/passwd')) > 0", "true) OR (SELECT 1", "true; DROP TABLE images"],
)
def test_what_reaches_beyond_the_rows_is_refused(condition: str) -> None:
    with pytest.raises(ConfigError):
        where.mask_where(ROWS, condition)


@pytest.mark.parametrize(
    "condition",
    [
        "width = (SELECT max(width) FROM images)",
        "width IN (SELECT w FROM (SELECT min(width) AS w FROM images))",
        "EXISTS (WITH t AS (FROM images) SELECT 1 UNION ALL SELECT 2 FROM t)",
        "(SELECT count(*) FROM query_table('images')) > 2",
        "row_number() OVER () = 1",
        "width = max(width)",
        "_row < 2",
        "NOT " * 2000 + "width = 1",
    ],
)
def test_what_looks_at_other_rows_is_refused(condition: str) -> None:
    """A table is read file by file: such a condition would mark other rows after a compaction."""
    with pytest.raises(ConfigError):
        where.check_where(condition, ROWS.schema)


@pytest.mark.parametrize(
    "condition",
    ["width = ANY([1, 5])", "len([x FOR x IN [width] IF x > 2]) > 0", "NOT " * 300 + "width BETWEEN 1 AND 2"],
)
def test_what_looks_at_one_row_is_not(condition: str) -> None:
    where.check_where(condition, ROWS.schema)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("(" * 1500, "nests more than 100 brackets"),
        ("[" * 900 + "1" + "]" * 900 + " IS NOT NULL", "nests more than 100 brackets"),
        ("(')' = '' OR " * 500 + "true" + ")" * 500, "nests more than 100 brackets"),
        ("width > --\r" + "(" * 1500, "nests more than 100 brackets"),
        ("a$b$" + "(" * 1500, "nests more than 100 brackets"),
        ("€a$b$" + "(" * 1500, "nests more than 100 brackets"),
        ("€a'' = 1 AND 1e'\\'' = '' OR " + "(" * 1500, "nests more than 100 brackets"),
        ("width > $1$ + " + "(" * 1500, "nests more than 100 brackets"),
        ("/* /* */ ' */ " + "(" * 1500, "a comment in a comment"),
        ("width > 1 -- " + "(" * 1501, "has 1,501 opening brackets, more than the 1,500 .* in texts and comments"),
        ("E''\n'\\' ' " + "(" * 8000, "has 8,000 opening brackets"),
        ("(" * 3000 + "width > 1" + ")" * 3000, "has 3,000 opening brackets"),
        ("(E'\\')' = '' OR " * 500 + "true" + ")" * 500, "nests more than 100 brackets"),
        ("width" + ".a" * 10_000 + " > 1", "a name of more than 20 parts"),
        ("width" + ' . "a b"' * 2_000 + " > 1", "a name of more than 20 parts"),
        ("width IN (" + "1, " * 50_000 + "1)", "has 150,012 characters, more than the 100,000"),
    ],
)
def test_a_condition_that_would_keep_the_parser_busy_is_refused_before(condition: str, told: str) -> None:
    for use in (lambda: where.check_where(condition, ROWS.schema), lambda: where.mask_where(ROWS, condition)):
        began = time.thread_time()
        with pytest.raises(ConditionError, match=told) as caught:
            use()
        assert time.thread_time() - began < 1.0, "of the quickest of them DuckDB took two seconds"
        assert len(str(caught.value)) < 400
        assert "shorter condition" in caught.value.remedy or "the inner one" in caught.value.remedy


@pytest.mark.parametrize(
    "condition",
    [
        "width IN (" + "5, " * 20_000 + "5)",
        "(" * 90 + "width = 5" + ")" * 90,
        "width = 5 AND '" + "(" * 500 + "' <> $$" + "[" * 500 + "$$ /* " + "{" * 300 + " */ -- " + "(" * 200 + "\n",
        "width = len([a$b$ FOR a$b$ IN [1, 2, 3, 4, 5]]) AND $ä1$" + "(" * 300 + "' $ä1$ /*/ **/ <> E'\\'(' ",
        "width = 5 " + "AND width BETWEEN 0.5 AND 99.5 " * 100,
    ],
)
def test_a_long_condition_that_nests_little_is_not(condition: str) -> None:
    where.check_where(condition, ROWS.schema)
    assert where.mask_where(ROWS, condition).tolist() == [False, True, False]


def test_one_connection_looks_at_the_files_of_a_table_and_keeps_nothing_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, "_HELD", threading.local())
    made: list[duckdb.DuckDBPyConnection] = []
    connect = duckdb.connect

    def connected(**options: Any) -> duckdb.DuckDBPyConnection:
        made.append(connect(**options))
        return made[-1]

    monkeypatch.setattr(duckdb, "connect", connected)
    for number in range(5):
        rows = pa.table({"width": pa.array(range(number, number + 4), pa.int32())})
        assert where.mask_where(rows, "width > 4").tolist() == [width > 4 for width in range(number, number + 4)]
    assert len(made) == 1
    with pytest.raises(duckdb.CatalogException):
        made[0].execute("SELECT * FROM images")
    with pytest.raises(ConditionError, match="height"):
        where.mask_where(pa.table({"width": [1]}), "height > 4")
    assert where.mask_where(pa.table({"height": [1, 5]}), "height > 4").tolist() == [False, True]
    assert len(made) == 2, "another after an error"
