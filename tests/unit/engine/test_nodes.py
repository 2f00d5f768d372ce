"""Nodes that lack what the driver has: the disk of the images, which are not taken for gone, the weights, the code."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from tests.images import encode, scene
from vlmflow.config import ImageLimits, PoolConfig, SourceConfig
from vlmflow.engine import columns, loading
from vlmflow.engine.decoding import ReadAndDecode
from vlmflow.engine.nodes import check_decoders, check_disks, decoders, unfound
from vlmflow.errors import ClusterError, FamilyError, WeightsError
from vlmflow.imaging import DECODER_VERSION, PixelRequest
from vlmflow.models import ModelIdentity
from vlmflow.sources import open_source


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Images that a manifest names, which lies elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for number in range(3):
        (disk / f"{number}.png").write_bytes(encode(scene(number, 16, 16), "PNG"))
    uris = [str(disk / f"{number}.png") for number in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["uri", *uris, str(disk / "never.png")]) + "\n", encoding="utf-8")
    return disk


def read_where_it_is_not_mounted(disk: Path) -> pa.Table:
    """The rows of a node without the disk."""
    decode, refs = decoding_of(disk)
    away = disk.rename(disk.parent / "elsewhere")
    rows = decode(refs)
    away.rename(disk)
    assert [[error["class"] for error in errors] for errors in rows["errors"].to_pylist()] == [["missing"]] * 4
    return rows


def decoding_of(disk: Path) -> tuple[ReadAndDecode, pa.Table]:
    source = open_source(SourceConfig(uri=str(disk.parent / "list.csv")))
    refs = pa.Table.from_batches(list(source.list()))
    due = pa.array([["embed"]] * refs.num_rows, pa.list_(pa.string()))
    refs = refs.append_column("due", due).append_column("due_if_same", pa.nulls(refs.num_rows, due.type))
    for name in ("previous_hash", "previous_caption"):
        refs = refs.append_column(name, pa.nulls(refs.num_rows, pa.string()))
    return ReadAndDecode(source.reader(ImageLimits()), (PixelRequest(16, "bicubic", ("squash",)),), ImageLimits()), refs


def test_images_that_the_driver_still_has_end_the_run(disk: Path) -> None:
    rows = read_where_it_is_not_mounted(disk)
    rows = columns.set_column(rows, columns.NODE, pa.array(["10.0.0.7"] * rows.num_rows))
    with pytest.raises(ClusterError, match=rf"^node 10\.0\.0\.7 .* {disk}/0\.png, which is there") as caught:
        check_disks(unfound(rows))
    assert "every node" in caught.value.remedy


def test_an_image_that_a_node_does_not_see_yet_beside_others_that_it_reads_is_missing(disk: Path) -> None:
    """As where a shared disk shows it an old listing: the next run reads it."""
    decode, refs = decoding_of(disk)
    late = (disk / "2.png").rename(disk / "late.png")
    rows = decode(refs)
    late.rename(disk / "2.png")
    assert [len(errors) for errors in rows["errors"].to_pylist()] == [0, 0, 1, 1]
    assert unfound(rows) == []


def test_a_node_with_another_decoder_is_named(disk: Path) -> None:
    decode, refs = decoding_of(disk)
    rows = decode(refs)
    assert list(decoders(rows)) == [DECODER_VERSION]
    check_decoders(decoders(rows))
    there = ["10.0.0.7", "10.0.0.8", "10.0.0.7", "10.0.0.8"]
    rows = columns.set_column(rows, columns.NODE, pa.array(there))
    versions = [DECODER_VERSION if node.endswith("8") else "4-pillow9" for node in there]
    rows = columns.set_column(rows, columns.DECODER_THERE, pa.array(versions))
    with pytest.raises(ClusterError, match=r"^on node 10\.0\.0\.7: images are decoded by 4-pillow9, and") as caught:
        check_decoders(decoders(rows))
    assert "extras heif and video, on every node" in caught.value.remedy
    of_one = columns.set_column(rows, columns.NODE, pa.array(["10.0.0.7"] * len(there)))
    assert set(decoders(of_one)) == {DECODER_VERSION, "4-pillow9"}


@pytest.mark.parametrize("change", ["gone", "others"])
def test_images_that_the_driver_has_no_more_are_gone(disk: Path, change: str) -> None:
    rows = read_where_it_is_not_mounted(disk)
    (disk / "2.png").write_bytes(b"another") if change == "others" else (disk / "2.png").unlink()
    check_disks(unfound(rows))


@pytest.mark.parametrize(
    ("family", "change", "error"),
    [
        ("open_clip", {}, None),
        ("open_clip", {"weights_digest": "other"}, WeightsError),
        ("open_clip", {"code_version": 7}, ClusterError),
        ("shop:Embedder", {}, None),
        ("shop:Embedder", {"code_version": 7}, FamilyError),
    ],
)
def test_a_node_with_other_weights_or_another_vlmflow_computes_nothing(
    family: str, change: dict[str, Any], error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would name what they were not made with."""
    planned = ModelIdentity("a/model", "local", "digest", "squash", 1)
    monkeypatch.setattr(loading, "identify", lambda *_: dataclasses.replace(planned, **change))
    setup = SimpleNamespace(models={"embed": SimpleNamespace(family=family)}, identities={"embed": planned})
    with pytest.raises(error) if error else nullcontext():
        loading.check_weights(PoolConfig(tasks=("embed", "moderate")), setup)  # type: ignore[arg-type]
