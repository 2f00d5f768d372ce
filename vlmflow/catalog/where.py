"""Rows chosen by a condition in SQL, as DuckDB reads it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.masks import Mask
from vlmflow.errors import ConditionError

_MAX_SECONDS, _MAX_MEMORY = 60.0, "2GiB"  # over one batch of rows
# Over what is longer or nests more DuckDB's parser sits for seconds to minutes, and no timer ends it.
_MAX_CHARS, _MAX_DEPTH = 100_000, 100
# Brackets that open, those in texts and comments too. The depth hangs on what we take for a text; whatever DuckDB takes
# for one, so many keep its parser busy for three to four seconds at worst (`[` in `[`), twice as many for over ten.
_MAX_OPENS = 1_500
_SHOWN_CHARS = 200
# Texts, names and comments, whose brackets count for nothing; a comment in a comment; a name of too many parts; a
# bracket. What is not closed goes on to the end. In a name DuckDB takes dollars and all beyond ASCII but spaces.
_TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z) | '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z)
        | [^\x00-@\[-^`{-\x7f\s][^\x00-\#%-/:-@\[-^`{-\x7f\s]*
        | --[^\n\r]* | /\*(?:(?!/\*|\*/).)*(?:\*/|\Z) | (?P<nested>/\*)
        | \$(?P<tag>(?:[^\x00-@\[-^`{-\x7f\s][^\x00-/:-@\[-^`{-\x7f\s]*)?)\$.*?(?:\$(?P=tag)\$|\Z)
        | (?P<parts>(?:\.\s*(?:\w+|"(?:[^"]|"")*")\s*){21}) | (?P<opens>[(\[{]) | (?P<closes>[)\]}])""",
    re.DOTALL | re.VERBOSE,
)
_HELD = threading.local()


def check_where(where: str, columns: pa.Schema) -> None:
    """Makes sure that a condition can be evaluated over any part of a table of these columns, row by row.

    Raises:
        ConditionError: it is no condition, is too long, has too many brackets or too many in each other, names a
            column that is not there, or looks at other rows than its own: a table is read file by file, and what a
            subquery finds would be another thing in each.
    """
    _select("1", columns.empty_table(), where)
    queries = [node for node in nodes_of(where) if isinstance(node, dict) and node.get("from_table")]
    # One reads the table that the condition is over. A list in `= ANY(...)` counts as a subquery that reads none.
    if sum(query["from_table"]["type"] != "EMPTY" for query in queries) > 1:
        raise ConditionError(
            f"{_named(where)} has a subquery",
            remedy="Say what holds of a row alone; of a list, as in len([l FOR l IN labels IF l.score > 0.9]) > 0.",
        )


def nodes_of(where: str) -> Iterator[Any]:
    """A condition that can be evaluated, as DuckDB's parser sees it.

    Yields:
        Every node of the tree of a query that ends with the condition: objects, lists and values of JSON.

    Raises:
        ConditionError: it cannot be written as a tree, or DuckDB lacks what writes trees.
    """
    query = f"SELECT 1 FROM images WHERE ({where})"
    with duckdb.connect(config={"enable_external_access": "false", "threads": 1}) as connection:
        try:
            found = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
        except duckdb.Error as error:
            raise ConditionError(
                f"DuckDB lacks its json extension: {error}", remedy="Install duckdb from PyPI."
            ) from error
    try:
        tree = json.loads((found or ("{}",))[0])
    except RecursionError as error:
        raise ConditionError(f"{_named(where)} nests its parts too deeply", remedy=_SHORTER) from error
    if tree.get("error", True):
        raise ConditionError(f"{_named(where)}: {tree.get('error_message', 'no condition')}", remedy=_REMEDY)
    left: list[Any] = [tree]
    while left:
        node = left.pop()
        yield node
        if isinstance(node, dict):
            left += node.values()
        elif isinstance(node, list):
            left += node


def mask_where(rows: pa.Table, where: str) -> Mask:
    """Marks the rows (N,) of which a condition is true; null counts as false.

    The condition sees these rows alone: no files, no network, no settings.

    Raises:
        ConditionError: it is no condition, or names a column that is not there.
    """
    # In the order of the rows: DuckDB promises none for a scan in several threads.
    numbered = rows.append_column("_row", pa.array(np.arange(rows.num_rows)))
    mask = np.zeros(rows.num_rows, np.bool_)
    mask[np.asarray(_select("_row", numbered, where), np.int64)] = True
    return mask


def _select(what: str, rows: pa.Table, where: str) -> npt.NDArray[Any]:
    """A value of each row of which a condition is true."""
    _check_size(where)
    if where != where.encode("utf-8", "replace").decode("utf-8"):
        raise ConditionError(f"{_named(where)} is not valid text", remedy=_REMEDY)
    connection = _connection()
    connection.register("images", rows)
    # A condition can be one that never ends.
    timer = threading.Timer(_MAX_SECONDS, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        statements = duckdb.extract_statements(f"SELECT {what} FROM images WHERE ({where})")
        if len(statements) != 1:
            raise ConditionError(f"{_named(where)} is more than a condition", remedy=_REMEDY)
        duckdb.SQLExpression(where)  # refuses what closes the parenthesis above and goes on after it
        return next(iter(connection.execute(statements[0]).fetchnumpy().values()))
    except duckdb.InterruptException as error:
        del _HELD.connection
        slow = f"{_named(where)} took more than {_MAX_SECONDS:g} s"
        raise ConditionError(slow, remedy=_REMEDY) from error
    except duckdb.Error as error:
        del _HELD.connection  # some leave it unusable
        reason = " ".join(str(error).split())[:200]
        raise ConditionError(f"{_named(where)}: {reason}", remedy=_REMEDY) from error
    finally:
        timer.cancel()
        connection.unregister("images")


def _connection() -> duckdb.DuckDBPyConnection:
    """This thread's own, made once: a table has hundreds of files, and to make one takes longer than to look at one."""
    connection: duckdb.DuckDBPyConnection | None = getattr(_HELD, "connection", None)
    if connection is None:
        config: dict[str, str | bool | int | float | list[str]] = {
            "enable_external_access": "false",
            "threads": 1,
            "memory_limit": _MAX_MEMORY,
        }
        connection = duckdb.connect(config=config)
        connection.execute("SET lock_configuration = true")
        _HELD.connection = connection
    return connection


def _check_size(where: str) -> None:
    """Refuses what would keep DuckDB's parser busy for minutes."""
    if len(where) > _MAX_CHARS:
        told = f"{_named(where)} has {len(where):,} characters, more than the {_MAX_CHARS:,} that one may have"
        raise ConditionError(told, remedy=_SHORTER)
    if (opens := sum(where.count(bracket) for bracket in "([{")) > _MAX_OPENS:
        told = f"{_named(where)} has {opens:,} opening brackets, more than the {_MAX_OPENS:,} that one may have"
        raise ConditionError(f"{told}, those in texts and comments included", remedy=_FEWER)
    depth = 0
    for token in _TOKEN.finditer(where):
        if token.lastgroup == "nested":
            raise ConditionError(f"{_named(where)} has a comment in a comment", remedy="Leave the inner one out.")
        if token.lastgroup == "parts":
            raise ConditionError(f"{_named(where)} has a name of more than 20 parts", remedy=_SHORTER)
        depth = max(depth + {"opens": 1, "closes": -1}.get(token.lastgroup or "", 0), 0)
        if depth > _MAX_DEPTH:
            raise ConditionError(f"{_named(where)} nests more than {_MAX_DEPTH} brackets", remedy=_SHORTER)


def _named(where: str) -> str:
    """A condition, as an error names it."""
    shown = repr(where[:_SHOWN_CHARS])
    return f"condition in SQL {shown}{'...' if len(where) > _SHOWN_CHARS else ''}"


_SHORTER = "Write a shorter condition with fewer brackets in brackets, or give several commands a part each."
_FEWER = "Write a shorter condition with fewer brackets, or give several commands a part each."
_REMEDY = "Write a condition over the columns of the images table, such as \"decision = 'block' AND width > 500\"."
