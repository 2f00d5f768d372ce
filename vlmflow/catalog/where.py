"""Rows chosen by a condition in SQL, as DuckDB reads it."""

from __future__ import annotations

import threading

import duckdb
import numpy as np
import pyarrow as pa

from vlmflow.catalog.masks import Mask
from vlmflow.errors import ConfigError

_MAX_SECONDS, _MAX_MEMORY = 60.0, "2GiB"  # over one batch of rows


def check_where(where: str, columns: pa.Schema) -> None:
    """Makes sure that a condition can be evaluated over a table of these columns.

    Raises:
        ConfigError: it is no condition, or names a column that is not there.
    """
    mask_where(columns.empty_table(), where)


def mask_where(rows: pa.Table, where: str) -> Mask:
    """Marks the rows (N,) of which a condition is true; null counts as false.

    The condition sees these rows alone: no files, no network, no settings.

    Raises:
        ConfigError: see :func:`check_where`.
    """
    if where != where.encode("utf-8", "replace").decode("utf-8"):
        raise ConfigError(f"--where {where!r} is not valid text", remedy=_REMEDY)
    # In the order of the rows: DuckDB promises none for a scan in several threads.
    numbered = rows.append_column("_row", pa.array(np.arange(rows.num_rows)))
    config: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "threads": 1,
        "memory_limit": _MAX_MEMORY,
    }
    with duckdb.connect(config=config) as connection:
        connection.execute("SET lock_configuration = true")
        connection.register("images", numbered)
        # A condition can be one that never ends.
        timer = threading.Timer(_MAX_SECONDS, connection.interrupt)
        timer.daemon = True
        timer.start()
        try:
            statements = duckdb.extract_statements(f"SELECT _row FROM images WHERE ({where})")
            if len(statements) != 1:
                raise ConfigError(f"--where {where!r} is more than a condition", remedy=_REMEDY)
            duckdb.SQLExpression(where)  # refuses what closes the parenthesis above and goes on after it
            found = connection.execute(statements[0]).fetchnumpy()["_row"]
        except duckdb.InterruptException as error:
            raise ConfigError(f"--where {where!r} took more than {_MAX_SECONDS:g} s", remedy=_REMEDY) from error
        except duckdb.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--where {where!r}: {reason}", remedy=_REMEDY) from error
        finally:
            timer.cancel()
    mask = np.zeros(rows.num_rows, np.bool_)
    mask[np.asarray(found, np.int64)] = True
    return mask


_REMEDY = "Write a condition over the columns of the images table, such as \"decision = 'block' AND width > 500\"."
