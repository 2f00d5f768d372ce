"""Each image once, of listings of any length."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from vlmflow.sources.unique import UniqueReferences

BATCH = 50_000


def ids(numbers: range) -> pa.Array:
    data = np.random.default_rng(numbers.start).bytes(16 * len(numbers)).hex()
    return pa.array([data[at : at + 32] for at in range(0, len(data), 32)])


def test_a_long_listing_takes_few_bytes_an_image() -> None:
    num_images, held = 20 * BATCH, []
    before = pa.total_allocated_bytes()

    def listed() -> Iterator[pa.RecordBatch]:
        for start in range(0, num_images, BATCH):
            yield pa.record_batch({"image_id": ids(range(start, start + BATCH))})
            held.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before)

    tracemalloc.start()
    next(iter(UniqueReferences(listed)))
    tracemalloc.stop()
    one_batch = 200 * BATCH  # with its ids as Python objects
    assert max(held) < 10 * num_images + one_batch


def test_ids_that_begin_alike_are_no_repetitions() -> None:
    first, second, other = ("0123456789abcdef" + end * 16 for end in "01f")
    batch = pa.record_batch({"image_id": [first, second, other, second]})
    unique = UniqueReferences(lambda: iter([batch]))
    rows = pa.Table.from_batches([*unique])
    assert rows["image_id"].to_pylist() == [first, second, other]
    assert unique.num_repeated == 1
