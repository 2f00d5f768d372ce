"""Planning on a cluster reads several files of a task at once."""

from __future__ import annotations

import threading

import pyarrow as pa

from tests.catalog_samples import image_id
from vlmflow.engine.planning import _read_buckets


def test_files_of_a_task_are_read_side_by_side() -> None:
    together = threading.Barrier(2)

    def read(number: int) -> pa.Table:
        together.wait(timeout=60)  # broken where one is read after the other
        return pa.table({"image_id": [image_id(f"{number}-{name}") for name in range(50)]})

    tables = _read_buckets(read, range(4))
    found = pa.concat_tables(tables)["image_id"].to_pylist()
    assert sorted(found) == sorted(image_id(f"{number}-{name}") for number in range(4) for name in range(50))
