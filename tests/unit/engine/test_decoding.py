"""The stage before the pools holds the files of so many images as fit its memory, and gives the same rows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest

from tests.images import encode, scene
from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.engine import columns, decoding
from vlmflow.engine.decoding import ReadAndDecode, give_way
from vlmflow.engine.pipeline import _as_function
from vlmflow.imaging import PixelRequest, hash_of
from vlmflow.imaging import decode as image_of
from vlmflow.imaging.resizing import _is_hurried
from vlmflow.sources import Fetched, Reader, Source, open_source

LIMITS = ImageLimits(max_bytes=10_000)
REQUESTS = (PixelRequest(16, "bicubic", ("squash",)),)


@dataclass
class Counting:
    """Another reader, and how many references it was given at a time."""

    reader: Reader
    asked: list[int] = field(default_factory=list)

    def read(self, refs: pa.Table) -> list[Fetched]:
        self.asked.append(refs.num_rows)
        return self.reader.read(refs)


def references(source: Source) -> pa.Table:
    """All that a source lists, due for `embed` for the first time."""
    refs = pa.Table.from_batches(list(source.list()))
    due = pa.array([["embed"]] * refs.num_rows, pa.list_(pa.string()))
    refs = refs.append_column("due", due).append_column("due_if_same", pa.nulls(refs.num_rows, due.type))
    for name in ("previous_hash", "previous_caption"):
        refs = refs.append_column(name, pa.nulls(refs.num_rows, pa.string()))
    return refs


def test_files_that_are_known_to_be_large_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(9):
        data = encode(scene(seed, 16, 16), "JPEG")
        (tmp_path / f"{seed}.jpg").write_bytes(data.ljust(3_000 if seed < 8 else 20_000, b"\0"))
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = references(source)
    reader = Counting(source.reader(LIMITS))
    decode = ReadAndDecode(reader, REQUESTS, LIMITS)
    whole = decode(refs)
    monkeypatch.setattr("vlmflow.engine.decoding._READ_AT_ONCE_BYTES", 10_000)
    parts = decode(refs)
    assert reader.asked == [9, 3, 3, 3], "the one beyond max_bytes is not read, and takes no room"
    spent = [columns.seconds_column("read"), columns.seconds_column("decode")]
    assert parts.drop_columns(spent).equals(whole.drop_columns(spent))
    monkeypatch.setattr("vlmflow.engine.decoding._READ_AT_ONCE_BYTES", 1)
    assert decode(refs.slice(0, 2)).num_rows == 2
    assert reader.asked[-2:] == [1, 1]
    unknown = refs.set_column(refs.schema.get_field_index("size_bytes"), "size_bytes", pa.nulls(9, pa.int64()))
    decode(unknown)
    assert reader.asked[-1] == 9


@pytest.mark.parametrize("for_gpu", [True, False])
def test_what_decodes_for_a_gpu_lets_pools_have_the_cores_and_hurries(
    for_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, hurries = list[int](), list[bool]()
    monkeypatch.setattr(os, "nice", steps.append)
    monkeypatch.setattr(decoding, "decode", lambda *given: (hurries.append(_is_hurried.get()), image_of(*given))[1])
    (tmp_path / "a.png").write_bytes(encode(scene(), "PNG"))
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = references(source)
    give_way.cache_clear()
    call = _as_function(ReadAndDecode(source.reader(LIMITS), REQUESTS, LIMITS, for_gpu=for_gpu))
    assert [call(refs).num_rows, call(refs).num_rows] == [1, 1]
    give_way.cache_clear()
    assert hurries == [for_gpu, for_gpu]
    assert len(steps) == for_gpu, "once, or it would get fewer and fewer"
    assert 15 < 15 + sum(steps) <= 19 or not for_gpu, "Ray starts workers at 15, and there is no more than 19"


def test_a_caption_goes_along_with_the_bytes_that_it_is_of_alone(tmp_path: Path) -> None:
    """`match` without `caption` would score an image against what another was said to show."""
    hashes = []
    for number in range(3):
        data = encode(scene(number, 16, 16), "PNG")
        (tmp_path / f"{number}.png").write_bytes(data)
        hashes.append(hash_of(data))
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = pa.Table.from_batches(list(source.list()))
    due = pa.array([["match"]] * 3, pa.list_(pa.string()))
    planned = {
        "due": due,
        "due_if_same": due,
        "previous_hash": pa.array([hashes[0], "of other bytes", None], pa.string()),
        "previous_caption": pa.array(["a", "b", None], pa.string()),
    }
    for name, values in planned.items():
        refs = refs.append_column(name, values)
    rows = ReadAndDecode(source.reader(LIMITS), REQUESTS, LIMITS)(refs)
    assert rows["previous_caption"].to_pylist() == ["a", None, None]
