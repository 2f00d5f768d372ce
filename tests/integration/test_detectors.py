"""Detectors of a policy in the pools: real photographs, the real network, stored scores used by later policies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.catalog_samples import rows_of
from tests.pictures import write_broken, write_pictures
from vlmflow.config import CatalogConfig, Job, ModelConfig
from vlmflow.engine import enrich, plan
from vlmflow.engine.remoderate import remoderate
from vlmflow.engine.report import RunReport
from vlmflow.models import identify
from vlmflow.models.opennsfw import OpenNsfw
from vlmflow.moderation.policy import bind, load_policy, write_binding

pytestmark = pytest.mark.usefixtures("ray_session")

DETECTORS = """
detectors:
  - name: opennsfw
    family: opennsfw
    outputs:
      nsfw: {category: sexual, label: nudity, review: REVIEW, block: 0.8}
"""


@pytest.fixture(scope="module")
def write_policy(
    models: dict[str, dict[str, Any]], policy: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """The policy of conftest with a detector."""
    folder = tmp_path_factory.mktemp("policies")

    def write(name: str, review: float, *, version: str = "2", detector: str = "opennsfw") -> str:
        text = Path(policy).read_text(encoding="utf-8").partition("\nbindings:")[0]
        text = text.replace('version: "1"', f'version: "{version}"')
        path = folder / f"{name}.yaml"
        detectors = DETECTORS.replace("REVIEW", str(review)).replace("name: opennsfw", f"name: {detector}")
        path.write_text(f"{text}{detectors}bindings: []\n", encoding="utf-8")
        write_binding(path, bind(load_policy(str(path)), identify("embed", ModelConfig(**models["embed"]))))
        return str(path)

    return write


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder, 4)
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    write_broken(folder)
    return folder


@pytest.fixture(scope="module")
def detected(
    make_job_in: Callable[..., Job],
    write_policy: Callable[..., str],
    photographs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Job, RunReport]:
    """A catalog with the detector's scores, of which a test that changes it takes a copy."""
    policy = write_policy("strict", 0.4)
    job = make_job_in(tmp_path_factory.mktemp("detected"), photographs, policy=policy, tasks=("embed", "moderate"))
    return job, enrich(job)


@pytest.fixture
def job(detected: tuple[Job, RunReport], tmp_path: Path) -> Job:
    """A copy of that catalog."""
    shutil.copytree(detected[0].catalog.uri, tmp_path / "catalog")
    return detected[0].model_copy(update={"catalog": CatalogConfig(uri=str(tmp_path / "catalog"))})


def nudity(row: dict[str, Any]) -> dict[str, Any]:
    (label,) = [label for label in row["labels"] if label["detector"] == "opennsfw"]
    assert (label["category"], label["label"], label["margin"]) == ("sexual", "nudity", None)
    return dict(label)


def test_a_detector_runs_in_the_pools_and_its_scores_serve_later_policies(
    detected: tuple[Job, RunReport], job: Job, write_policy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = detected
    rows = rows_of(job)
    good = {name: row for name, row in rows.items() if row["status"] == "ok"}
    assert len(good) == 6
    assert {stage.stage for stage in report.stages} >= {"embed", "detect", "moderate"}
    for row in good.values():
        (found,) = row["detections"]
        assert found["detector"] == "opennsfw"
        assert nudity(row)["score"] == found["score"]
        assert row["detect_fingerprint"] is not None
    for name in ("temple.jpg", "flower.jpg"):
        assert good[name]["detections"][0]["score"] < 0.1
        assert nudity(good[name])["decision"] == "allow"
    for row in rows.values():
        if row["status"] == "unreadable":
            assert (row["decision"], row["detections"], row["detect_fingerprint"]) == ("review", None, None)
    assert enrich(job).status == "nothing_due"

    # Another threshold: decided from what is stored, no image is read and no network runs.
    def never(*_: object) -> None:
        raise AssertionError("a detector ran")

    monkeypatch.setattr(OpenNsfw, "load", never)
    scores = sorted(row["detections"][0]["score"] for row in good.values())
    middle = float(np.float32((scores[2] + scores[3]) / 2))
    other = job.model_copy(update={"policy": write_policy("lax", middle, version="3")})
    moved = remoderate(other)
    assert (moved.num_moved, moved.num_from_margins, moved.num_undetected) == (6, 6, 0)
    after = rows_of(job)
    for name, row in good.items():
        assert after[name]["detections"] == row["detections"]
        expected = "review" if row["detections"][0]["score"] >= middle else "allow"
        assert nudity(after[name])["decision"] == expected
    assert sum(nudity(after[name])["decision"] == "review" for name in good) == 3
    back = remoderate(other, rollback=moved.policy_digest[:12])
    assert (back.num_moved, back.detectors) == (6, ("opennsfw",))
    moderated = ["labels", "decision", "decision_reason", "policy_digest"]
    for name, row in rows_of(job).items():
        assert [row[column] for column in moderated] == [rows[name][column] for column in moderated]


@pytest.mark.slow
def test_a_policy_with_a_new_detector_waits_for_the_images(
    detected: tuple[Job, RunReport],
    make_job: Callable[..., Job],
    write_policy: Callable[..., str],
    photographs: Path,
) -> None:
    job = make_job(photographs, tasks=("embed", "moderate"))
    enrich(job)
    before = rows_of(job)
    with_detector = job.model_copy(update={"policy": write_policy("new", 0.4)})

    report = remoderate(with_detector)

    assert (report.num_moved, report.num_undetected, report.detectors) == (0, 6, ("opennsfw",))
    assert rows_of(job) == before
    due = plan(with_detector).due
    assert due["detect"] == {"task_added": 6}
    enrich(with_detector)
    after = [row for row in rows_of(job).values() if row["status"] == "ok"]
    assert {row["policy_version"] for row in after} == {"2"}
    assert all(len(row["detections"]) == 1 for row in after)
    for name, row in rows_of(detected[0]).items():
        mine = rows_of(job)[name]
        for column in ("labels", "decision", "decision_reason", "detections"):
            assert mine[column] == row[column], (name, column)


def test_a_policy_that_renames_a_detector_is_applied_by_the_next_run(
    job: Job, write_policy: Callable[..., str]
) -> None:
    renamed = job.model_copy(update={"policy": write_policy("renamed", 0.4, version="3", detector="adult")})
    assert remoderate(renamed).num_undetected == 6
    assert plan(renamed).due["detect"] == {"undetected": 6}
    enrich(renamed)
    after = [row for row in rows_of(job).values() if row["status"] == "ok"]
    assert {row["policy_version"] for row in after} == {"3"}
    assert {label["detector"] for row in after for label in row["labels"]} == {None, "adult"}
    assert enrich(renamed).status == "nothing_due"


def test_a_detector_that_fails_leaves_no_image_allowed(
    make_job: Callable[..., Job], models: dict[str, dict[str, Any]], policy: str, tmp_path: Path
) -> None:
    """A checkpoint whose weights are so large that of all but black images they give no number."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label={0: "bad", 1: "good"}, **sizes))
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "broken")
    as_it_is = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    ViTImageProcessor(size={"height": 32, "width": 32}, **as_it_is).save_pretrained(tmp_path / "broken")
    text = Path(policy).read_text(encoding="utf-8").partition("\nbindings:")[0]
    text += f"""
detectors:
  - name: broken
    family: image_classification
    path: {tmp_path / "broken"}
    outputs:
      bad: {{category: weapons, label: gun, review: 0.4, block: 0.8}}
bindings: []
"""
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    write_binding(path, bind(load_policy(str(path)), identify("embed", ModelConfig(**models["embed"]))))
    write_pictures(tmp_path / "images", 5)
    job = make_job(tmp_path / "images", policy=str(path), tasks=("embed", "moderate", "caption"))

    report = enrich(job)

    rows = rows_of(job)
    assert report.statuses == {"partial": 5}
    for row in rows.values():
        assert row["decision"] in ("review", "block")
        assert [error["stage"] for error in row["errors"]] == ["detect"]
        assert "not finite" in row["errors"][0]["message"]
        assert row["caption"] is not None
        assert len(row["labels"]) == 3
    assert plan(job).due["detect"] == {"retry": 5}
