"""Rows chosen by a condition in SQL, as DuckDB reads it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmflow.catalog.masks import Mask
from vlmflow.errors import ConfigError

_MAX_SECONDS, _MAX_MEMORY = 60.0, "2GiB"  # over one batch of rows


def check_where(where: str, columns: pa.Schema) -> None:
    """Makes sure that a condition can be evaluated over any part of a table of these columns, row by row.

    Raises:
        ConfigError: it is no condition, names a column that is not there, or looks at other rows than its own: a table
            is read file by file, and what a subquery finds would be another thing in each.
    """
    _select("1", columns.empty_table(), where)
    queries = [node for node in nodes_of(where) if isinstance(node, dict) and node.get("from_table")]
    # One reads the table that the condition is over. A list in `= ANY(...)` counts as a subquery that reads none.
    if sum(query["from_table"]["type"] != "EMPTY" for query in queries) > 1:
        raise ConfigError(
            f"condition in SQL {where!r} has a subquery",
            remedy="Say what holds of a row alone; of a list, as in len([l FOR l IN labels IF l.score > 0.9]) > 0.",
        )


def nodes_of(where: str) -> Iterator[Any]:
    """A condition that can be evaluated, as DuckDB's parser sees it.

    Yields:
        Every node of the tree of a query that ends with the condition: objects, lists and values of JSON.

    Raises:
        ConfigError: it cannot be written as a tree, or DuckDB lacks what writes trees.
    """
    query = f"SELECT 1 FROM images WHERE ({where})"
    with duckdb.connect(config={"enable_external_access": "false", "threads": 1}) as connection:
        try:
            found = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
        except duckdb.Error as error:
            raise ConfigError(
                f"DuckDB lacks its json extension: {error}", remedy="Install duckdb from PyPI."
            ) from error
    try:
        tree = json.loads((found or ("{}",))[0])
    except RecursionError as error:
        raise ConfigError("condition in SQL nests its parts too deeply", remedy=_REMEDY) from error
    if tree.get("error", True):
        raise ConfigError(f"condition in SQL {where!r}: {tree.get('error_message', 'no condition')}", remedy=_REMEDY)
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
        ConfigError: it is no condition, or names a column that is not there.
    """
    # In the order of the rows: DuckDB promises none for a scan in several threads.
    numbered = rows.append_column("_row", pa.array(np.arange(rows.num_rows)))
    mask = np.zeros(rows.num_rows, np.bool_)
    mask[np.asarray(_select("_row", numbered, where), np.int64)] = True
    return mask


def _select(what: str, rows: pa.Table, where: str) -> npt.NDArray[Any]:
    """A value of each row of which a condition is true."""
    if where != where.encode("utf-8", "replace").decode("utf-8"):
        raise ConfigError(f"condition in SQL {where!r} is not valid text", remedy=_REMEDY)
    config: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "threads": 1,
        "memory_limit": _MAX_MEMORY,
    }
    with duckdb.connect(config=config) as connection:
        connection.execute("SET lock_configuration = true")
        connection.register("images", rows)
        # A condition can be one that never ends.
        timer = threading.Timer(_MAX_SECONDS, connection.interrupt)
        timer.daemon = True
        timer.start()
        try:
            statements = duckdb.extract_statements(f"SELECT {what} FROM images WHERE ({where})")
            if len(statements) != 1:
                raise ConfigError(f"condition in SQL {where!r} is more than a condition", remedy=_REMEDY)
            duckdb.SQLExpression(where)  # refuses what closes the parenthesis above and goes on after it
            return next(iter(connection.execute(statements[0]).fetchnumpy().values()))
        except duckdb.InterruptException as error:
            slow = f"condition in SQL {where!r} took more than {_MAX_SECONDS:g} s"
            raise ConfigError(slow, remedy=_REMEDY) from error
        except duckdb.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"condition in SQL {where!r}: {reason}", remedy=_REMEDY) from error
        finally:
            timer.cancel()


_REMEDY = "Write a condition over the columns of the images table, such as \"decision = 'block' AND width > 500\"."
