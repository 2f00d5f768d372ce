"""ViLBERT in the pipeline: regions of the caller's for one role, of a detector for the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import write_pictures
from tests.vilbert import make_detector, make_vilbert
from vlmflow.catalog import Catalog
from vlmflow.config import Job, ModelConfig, SourceConfig
from vlmflow.engine import enrich
from vlmflow.errors import ConfigError
from vlmflow.schema import REGIONS

pytestmark = pytest.mark.usefixtures("ray_session")


def vilbert(folder: Path) -> ModelConfig:
    return ModelConfig(family="vilbert", path=str(folder))


@pytest.mark.slow
def test_regions_of_the_source_and_of_a_detector(make_job: Callable[..., Job], tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "images", 4)
    boxes = [[0.0, 0.0, 8.0, 8.0], [2.0, 2.0, 9.0, 6.0]]
    values = [
        {"features": [[0.1 * number + place] * 12 for place in range(2)], "boxes": boxes, "width": 10, "height": 10}
        for number in range(3)
    ]
    columns = {
        "uri": [str(path) for path in pictures],
        "title": ["a cat", "a dog", "a car", "an apple"],
        "regions": pa.array([*values, None], REGIONS),
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    matcher = make_vilbert(tmp_path / "matcher", {"kind": "columns", "max_regions": 4})
    answerer = make_vilbert(tmp_path / "answerer", make_detector(tmp_path / "answerer"), num_features=1024)
    job = make_job(
        tmp_path / "list.parquet",
        source_options={"text_column": "title", "regions_column": "regions"},
        tasks=("match", "answer"),
        pools=[{"tasks": ("match", "answer"), "cpus": 0.5, "batch_size": 16}],
        questions=("two dogs", "a red car"),
        models={"match": vilbert(matcher), "answer": vilbert(answerer)},
    )

    report = enrich(job)

    assert report.statuses == {"ok": 3, "partial": 1}
    rows = {row["source"]["title"]: row for row in Catalog.open(job.catalog).images().to_pylist()}
    for title, row in rows.items():
        assert set(row["source"]) == {"title"}, "the features are not copied into the catalog"
        assert [answer["question"] for answer in row["answers"]] == ["two dogs", "a red car"]
        assert all(0 < answer["score"] < 1 for answer in row["answers"])
        assert row["text_itc"] is None, "the model has no contrastive head"
        if title != "an apple":
            assert 0 < row["text_itm"] < 1
    assert len({rows[title]["text_itm"] for title in ("a cat", "a dog", "a car")}) == 3
    (error,) = rows["an apple"]["errors"]
    assert (error["stage"], error["class"]) == ("match", "task_failed")
    assert "no regions" in error["message"]
    assert rows["an apple"]["text_itm"] is None

    without = job.model_copy(update={"source": SourceConfig(uri=str(tmp_path / "list.parquet"), text_column="title")})
    with pytest.raises(ConfigError, match="reads regions from a column of the source"):
        enrich(without)
