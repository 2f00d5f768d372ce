"""Pixels on their way to a pool's tasks: JPEGs decoded in the pool are to them what processors would have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from tests.images import bad_images, damaged_jpegs, encode, good_images, scene
from tests.unit.imaging.test_colours import P3, icc
from vlmflow import schema
from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.engine import columns, feeding
from vlmflow.engine.decoding import PoolDecoding, ReadAndDecode
from vlmflow.engine.feeding import Fed, Feeder, _without_copies
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.resizing import _is_hurried
from vlmflow.sources import open_source
from vlmflow.tasks.pixels import all_views, first_views

SMALL = PixelRequest(24, "bicubic", ("squash",))
LARGE = PixelRequest(40, "bicubic", ("squash", "center", "tiles"))
REQUESTS = (SMALL, LARGE)
LIMITS = ImageLimits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    files = dict(good_images()) | {name: data for name, (data, _) in bad_images().items()}
    files |= {f"jpeg-{seed}.jpg": encode(scene(seed, 90 + 60 * seed, 64), "JPEG") for seed in range(4)}
    files["wide.jpg"] = encode(scene(5, 120, 80), "JPEG", icc_profile=icc(primaries=P3))
    files |= damaged_jpegs()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path, *, leaves_jpegs: bool) -> pa.Table:
    source = open_source(SourceConfig(uri=str(folder)))
    references = pa.Table.from_batches(list(source.list()))
    num_rows = references.num_rows
    due = pa.array([["embed", "caption"]] * num_rows, pa.list_(pa.string()))
    references = references.append_column("due", due)
    references = references.append_column("due_if_same", pa.nulls(num_rows, due.type))
    for name in ("previous_hash", "previous_caption"):
        references = references.append_column(name, pa.nulls(num_rows, pa.string()))
    reader = source.reader(LIMITS)
    return ReadAndDecode(reader, REQUESTS, LIMITS, leaves_jpegs=leaves_jpegs)(references)


def feed(batch: pa.Table, later: tuple[PixelRequest, ...] = ()) -> tuple[Feeder, Fed]:
    feeder = Feeder(REQUESTS, later, "cpu", PoolDecoding(REQUESTS, LIMITS))
    return feeder, feeder(batch)


def names(batch: pa.Table) -> list[str]:
    return [uri.rsplit("/", 1)[-1] for uri in batch["uri"].to_pylist()]


def test_rows_are_those_of_the_ordinary_path(folder: Path) -> None:
    before, left = read(folder, leaves_jpegs=False), read(folder, leaves_jpegs=True)
    num_left = left.num_rows - left[columns.ENCODED].null_count
    assert num_left == 7, "photo, rotated, and five of our own"
    after = feed(left)[1].batch
    compared = [*schema.FACTS.names, "errors", columns.RUN_TASKS, columns.TASKS_COPIED]
    compared += ["views_24_bicubic", "views_40_bicubic", "bytes_read"]
    for name, ours, theirs in zip(
        names(before), after.select(compared).to_pylist(), before.select(compared).to_pylist(), strict=True
    ):
        hashes = ours.pop("phash"), theirs.pop("phash")
        assert ours == theirs, name
        assert (hashes[0] is None) == (hashes[1] is None), name
        if hashes[0] is not None:
            assert (int(hashes[0], 16) ^ int(hashes[1], 16)).bit_count() <= 4, name


def test_damaged_jpegs_are_what_pillow_makes_of_them(folder: Path) -> None:
    before, left = read(folder, leaves_jpegs=False), read(folder, leaves_jpegs=True)
    rows = pa.array([row for row, name in enumerate(names(left)) if name in damaged_jpegs()])
    assert left[columns.ENCODED].take(rows).null_count == len(rows) == len(damaged_jpegs())
    ours, theirs = left.take(rows).select(before.column_names), before.take(rows)
    assert ours.drop_columns(_TIMES).equals(theirs.drop_columns(_TIMES))


def test_tasks_find_the_pixels_of_the_ordinary_path(folder: Path) -> None:
    before = read(folder, leaves_jpegs=False)
    feeder, fed = feed(read(folder, leaves_jpegs=True))
    good = [row for row, tasks in enumerate(before[columns.RUN_TASKS].to_pylist()) if tasks]
    random = np.random.default_rng(0)
    for rows in (good, good[:1], good[3:9], list(random.permutation(good))):
        for request in REQUESTS:
            expected, starts = all_views(before.take(pa.array(rows)), request)
            with feeder.lent(fed):
                pixels, offsets = all_views(fed.batch.take(pa.array(rows)), request)
                first = first_views(fed.batch.take(pa.array(rows)), request)
            assert offsets.tolist() == starts.tolist()
            # Of a few JPEGs the ordinary path decodes at reduced scale, which shows at hard edges.
            assert (pixels.int() - expected.int()).abs().float().mean() < 0.5
            assert torch.equal(first, pixels[torch.from_numpy(offsets[:-1])])


def test_a_row_without_pixels_is_refused(folder: Path) -> None:
    feeder, fed = feed(read(folder, leaves_jpegs=True))
    bad = [row for row, tasks in enumerate(fed.batch[columns.RUN_TASKS].to_pylist()) if not tasks]
    with feeder.lent(fed), pytest.raises(ValueError, match="no pixels"):
        all_views(fed.batch.take(pa.array(bad)), SMALL)


def test_later_pools_get_pixels_and_views_as_if_all_had_been_decoded_before(folder: Path) -> None:
    before = read(folder, leaves_jpegs=False)
    feeder, fed = feed(read(folder, leaves_jpegs=True), later=(LARGE,))
    passed = feeder.finish(fed.batch, fed)
    gone = {"pixels_24_bicubic", "views_24_bicubic", columns.ENCODED, columns.ORIENTATION, columns.SHAPER}
    assert not gone & set(passed.column_names)
    assert passed["views_40_bicubic"].to_pylist() == before["views_40_bicubic"].to_pylist()
    good = pa.array([row for row, tasks in enumerate(before[columns.RUN_TASKS].to_pylist()) if tasks])
    pixels, expected = (all_views(batch.take(good), LARGE)[0] for batch in (passed, before))
    assert (pixels.int() - expected.int()).abs().float().mean() < 0.5


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("nvjpeg: not supported")


def test_what_the_device_refuses_is_decoded_by_a_processor_to_the_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(folder, leaves_jpegs=False)
    left = read(folder, leaves_jpegs=True)
    feeder = Feeder(REQUESTS, REQUESTS, "cpu", PoolDecoding(REQUESTS, LIMITS))
    monkeypatch.setattr(feeder._decoder, "_decode_jpeg", refuse)
    hurries: list[bool] = []
    monkeypatch.setattr(feeding, "decode", lambda *given: (hurries.append(_is_hurried.get()), decode(*given))[1])
    fed = feeder(left)
    assert fed.num_refused == 7
    assert hurries == [True] * 7, "a device waits for them, and torch is there"
    passed = feeder.finish(fed.batch, fed)
    apart = [*_TIMES, "phash"]  # the hash was taken before
    assert passed.select(before.column_names).drop_columns(apart).equals(before.drop_columns(apart))


def test_what_neither_device_nor_processor_decodes_is_an_error_of_its_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImageError("not enough memory", error_class=RowErrorClass.OUT_OF_MEMORY)

    left = read(folder, leaves_jpegs=True)
    feeder = Feeder(REQUESTS, (), "cpu", PoolDecoding(REQUESTS, LIMITS))
    monkeypatch.setattr(feeder._decoder, "_decode_jpeg", refuse)
    monkeypatch.setattr(feeding, "decode", fail)
    was_left = pc.is_valid(left[columns.ENCODED])
    after = feeder(left).batch
    failed = after.filter(was_left)
    assert all(failed[name].null_count == len(failed) for name in schema.FACTS.names)
    assert failed[columns.RUN_TASKS].to_pylist() == [[]] * 7
    error = {"stage": "decode", "class": "out_of_memory", "message": "not enough memory"}
    assert failed["errors"].to_pylist() == [[error]] * 7
    compared = [*schema.FACTS.names, "errors", columns.RUN_TASKS]
    others = pc.invert(was_left)
    assert after.filter(others).select(compared).equals(left.filter(others).select(compared))


def test_where_the_device_has_no_memory_left_the_pixels_wait_on_the_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(self: Feeder, part: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("9.75 GiB asked for")

    before = read(folder, leaves_jpegs=False)
    expected = feed(before)[1].views["40_bicubic"]
    monkeypatch.setattr(Feeder, "_moved", run_out)
    releases: list[None] = []
    monkeypatch.setattr(feeding, "release_memory", lambda: releases.append(None))
    fed = feed(before)[1]
    assert len(releases) == len(REQUESTS), "the next batch may find room"
    assert fed.num_refused == 0
    found = fed.views["40_bicubic"]
    assert torch.equal(found.pixels, expected.pixels)
    assert found.starts.tolist() == expected.starts.tolist()


_TIMES = ["seconds_read", "seconds_decode"]


def test_files_are_seen_where_they_lie() -> None:
    files = pa.array([b"first", b"", b"\xff\xd8third", b"last"], pa.large_binary())
    seen = _without_copies(files.slice(1))
    assert [bytes(file) for file in seen] == [b"", b"\xff\xd8third", b"last"]
    address = np.frombuffer(seen[1], np.uint8).ctypes.data
    assert address == files.buffers()[2].address + len(b"first")
