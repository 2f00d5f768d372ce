"""A pool in which one dual encoder embeds, moderates and matches: one copy of it, and one pass of each view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.dual_encoders import make_dual_encoder
from tests.unit.engine.test_side_by_side import DEMO, decoded_batches
from vlmflow.config import CatalogConfig, Job, ModelConfig, PoolConfig, SourceConfig, TaskName, ViewName
from vlmflow.engine import columns
from vlmflow.engine.pools import PoolWorker
from vlmflow.models.dual_encoder import DualEmbedder
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup, prepare_prompts, prepare_tasks

TASKS: tuple[TaskName, ...] = ("embed", "moderate", "match")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual_encoder(tmp_path_factory.mktemp("dual") / "siglip", "siglip")


class Encoded:
    """Counts the images that dual encoders encode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        encode = DualEmbedder._image_features

        def counted(embedder: DualEmbedder, pixels: torch.Tensor) -> torch.Tensor:
            self.calls.append(len(pixels))
            return encode(embedder, pixels)

        monkeypatch.setattr(DualEmbedder, "_image_features", counted)


Prepared = tuple[list[pa.Table], TaskSetup, PromptVectors | None]


def prepared(folder: Path, views: tuple[ViewName, ...]) -> Prepared:
    """Some of the demo's pictures, decoded, in three batches."""
    model = ModelConfig(family="dual_encoder", path=str(folder))
    job = Job(
        source=SourceConfig(uri=str(DEMO / "manifest.csv"), text_column="title"),
        catalog=CatalogConfig(uri="unused"),
        profile="starter",
        tasks=TASKS,
        models={"embed": model, "match": model},
        policy="demo",
        accept_unbound=True,
        views=views,
    )
    setup = prepare_tasks(job)
    return decoded_batches(job, setup)[:3], setup, prepare_prompts(setup)


@pytest.fixture(scope="module")
def whole_images(folder: Path) -> Prepared:
    return prepared(folder, ("squash",))


def worker_of(tasks: tuple[TaskName, ...], setup: TaskSetup, prompts: Any, later: tuple[TaskName, ...] = ()) -> Any:
    return PoolWorker(PoolConfig(tasks=tasks), setup, prompts, later=later)


def values(batches: list[pa.Table], name: str) -> list[Any]:
    return [value for batch in batches for value in batch[name].to_pylist()]


def test_one_pass_gives_what_two_pools_with_a_model_each_give(
    whole_images: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, setup, prompts = whole_images
    one, encoded = worker_of(TASKS, setup, prompts), Encoded(monkeypatch)
    found = [one(batch) for batch in batches]
    assert sum(encoded.calls) == sum(view is not None for view in values(found, "vector_views"))

    first = worker_of(("embed", "moderate"), setup, prompts, later=("match",))
    second = worker_of(("match",), setup, prompts)
    expected = [second(first(batch)) for batch in batches]
    for name in ("vectors", "vector_views", "labels", "decision", "text_itc", "text_itm", "errors"):
        assert values(found, name) == values(expected, name), name
    assert len(set(values(found, "text_itc"))) > 5
    assert len({decision for decision in values(found, "decision") if decision}) == 1, "unbound: all are review"
    assert one._tasks["match"].task._matcher._embedder is one._tasks["embed"].task._embedder


def test_all_views_are_encoded_once_and_matching_computes_texts_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, setup, prompts = prepared(folder, ("squash", "center", "tiles", "black"))
    one, encoded = worker_of(TASKS, setup, prompts), Encoded(monkeypatch)
    found = [one(batch) for batch in batches]
    views = [names for names in values(found, "vector_views") if names]
    num_views = sum(map(len, views))
    assert num_views > len(views) + 3, "most of the demo's pictures would be squares"
    assert sum(encoded.calls) == num_views

    alone = worker_of(("match",), setup, prompts)
    lonely = [alone(batch) for batch in batches]
    cosines = [np.array(values(of, "text_itc"), float) for of in (found, lonely)]
    np.testing.assert_allclose(cosines[0], cosines[1], atol=1e-5)
    spent = [sum(values(of, f"{columns.FLOPS_PREFIX}match")) for of in (found, lonely)]
    assert 0 < spent[0] < spent[1], "the record tells of texts alone where images are another task's"


def test_images_that_a_preflight_shows_again_are_encoded_again(
    whole_images: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, *_), setup, prompts = whole_images
    one, encoded = worker_of(TASKS, setup, prompts), Encoded(monkeypatch)
    for number in range(3):
        names = pa.array([f"{number}-{row}" for row in range(batch.num_rows)], pa.string())
        one(columns.set_column(batch, "content_hash", names))  # as TriedPool does
    assert len(encoded.calls) == 3
    assert len(set(encoded.calls)) == 1
