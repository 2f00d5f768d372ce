"""Regions of the caller's: passed over by listing, read row by row, refused where they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import write_pictures
from vlmflow import schema
from vlmflow.config import SourceConfig
from vlmflow.errors import SourceError, StoreLostError
from vlmflow.sources import open_source
from vlmflow.sources.regions import RegionReader
from vlmflow.tasks.shown import REGIONS_COLUMN, shown

# As a caller may have it: doubles, boxes of a fixed size, integers.
CALLERS = pa.struct(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64(), 4))),
        ("features", pa.large_list(pa.list_(pa.float64()))),
        ("detector", pa.string()),
    ]
)


def value(number: int, count: int = 2) -> dict[str, Any]:
    return {
        "features": [[float(number), float(place), 0.5] for place in range(count)],
        "boxes": [[0.0, 0.0, 20.0, 10.0 + place] for place in range(count)],
        "width": 40,
        "height": 20,
        "detector": "mine",
    }


def write(path: Path, values: list[dict[str, Any] | None], kind: pa.DataType = CALLERS, **columns: Any) -> Path:
    uris = [f"image-{number}.png" for number in range(len(values))]
    table = {"uri": uris, "title": [f"t{number}" for number in range(len(values))], **columns}
    pq.write_table(pa.table({**table, "regions": pa.array(values, kind)}), path, row_group_size=3)
    return path


def listed(config: SourceConfig) -> tuple[pa.Table, RegionReader]:
    """The references, and the reader of their regions as a worker gets it."""
    source = open_source(config)
    refs = pa.Table.from_batches(list(source.list()))
    return refs, pickle.loads(pickle.dumps(RegionReader(config, source.version)))


def config(path: Path, **changes: Any) -> SourceConfig:
    return SourceConfig(uri=str(path), regions_column="regions", **changes)


def test_listing_passes_them_over_and_the_reader_finds_them(tmp_path: Path) -> None:
    values = [value(number, count=1 + number % 3) if number != 4 else None for number in range(8)]
    source = config(write(tmp_path / "list.parquet", values))
    refs, reader = listed(source)
    assert refs.schema.field("source").type == pa.struct([("title", pa.string())])
    assert refs["regions_row"].to_pylist() == list(range(8))

    mixed = refs.take([6, 4, 0, 6, 3])
    found = reader.read(mixed, [True, True, True, True, False])
    assert found.type == schema.REGIONS
    rows = found.to_pylist()
    assert rows[1] is None, "the source has none"
    assert rows[4] is None, "not wanted"
    assert rows[0] == rows[3]
    assert rows[0]["features"] == values[6]["features"]  # type: ignore[index]
    assert (rows[2]["width"], rows[2]["height"]) == (40, 20)

    batch = pa.table({REGIONS_COLUMN: found.take(pa.array([0, 2]))})
    regions: Any = shown(batch, None)
    assert regions.mask.tolist() == [[True], [True]]
    assert regions.boxes[0].tolist() == [[0.0, 0.0, 0.5, 0.5]], "as parts of the image"


def test_a_file_of_image_bytes_has_them_beside_the_bytes(tmp_path: Path) -> None:
    (picture,) = write_pictures(tmp_path / "images", 1)
    path = write(tmp_path / "images.parquet", [value(0), value(1)], image=[picture.read_bytes()] * 2)
    source = config(path)
    refs, reader = listed(source)
    assert refs["row"].to_pylist() == [0, 1]
    assert [row["features"][0][0] for row in reader.read(refs, [True, True]).to_pylist()] == [0.0, 1.0]


def test_a_file_that_was_written_again_ends_the_run(tmp_path: Path) -> None:
    source = config(write(tmp_path / "list.parquet", [value(0)]))
    opened = open_source(source)
    refs = pa.Table.from_batches(list(opened.list()))
    write(tmp_path / "list.parquet", [value(1), value(0)])
    reader = RegionReader(source, opened.version)  # is made when the cluster has started
    with pytest.raises(StoreLostError, match="changed since it was listed"):
        reader.read(refs, [True])
    (tmp_path / "list.parquet").unlink()
    with pytest.raises(StoreLostError):
        reader.read(refs, [True])


def test_columns_of_another_kind_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    write(path, [{"features": [1.0]}], pa.struct([("features", pa.list_(pa.float32()))]))
    with pytest.raises(SourceError, match="column regions of regions"):
        listed(config(path))
    with pytest.raises(SourceError, match="no such column"):
        listed(SourceConfig(uri=str(path), regions_column="boxes"))
    csv = tmp_path / "list.csv"
    csv.write_text("uri,regions\na.png,1\n")
    with pytest.raises(SourceError, match=r"regions in a \.csv file"):
        listed(config(csv))
    write_pictures(tmp_path / "images", 1)
    with pytest.raises(SourceError, match="regions_column"):
        open_source(config(tmp_path / "images")).columns  # noqa: B018


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": [[1.0, 2.0], [3.0]]}, "differ in length"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, "boxes of shape"),
        ({"boxes": [[0.0, 0.0, 1.0, float("nan")]] * 2}, "not finite"),
        ({"features": []}, "features of shape"),
        ({"width": 0}, "without a size"),
        ({"width": None}, "no regions of this image"),
    ],
)
def test_regions_that_do_not_fit_together_cost_their_row(change: dict[str, Any], told: str) -> None:
    row = {name: part for name, part in value(0).items() if name != "detector"} | change
    with pytest.raises(ValueError, match=told):
        shown(pa.table({REGIONS_COLUMN: pa.array([row], schema.REGIONS)}), None)
