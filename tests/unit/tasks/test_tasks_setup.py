"""From a job to tasks that run: with tiny models in the real formats."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from tests.models import IMAGE_SIZE, make_captioner, make_clip, make_matcher, random_pixels
from vlmflow.config import Job
from vlmflow.errors import ConfigError, UnboundPolicyError
from vlmflow.models import identify, load_captioner
from vlmflow.models.identity import short_digest
from vlmflow.moderation.policy import bind, load_policy, write_binding
from vlmflow.search.query import QueryEncoder
from vlmflow.tasks import add_columns
from vlmflow.tasks.run import BatchLimit, run_contained
from vlmflow.tasks.setup import load_task, prepare_prompts, prepare_tasks

POLICY = {
    "name": "test",
    "version": "1",
    "neutral": ["a car", "a house"],
    "categories": [
        {"name": "weapons", "labels": [{"name": "gun", "prompts": ["a gun", "two guns"], "review": 0.5, "block": 0.8}]}
    ],
    "logistic": {"scale": 10.0, "offset": 0.0},
    "bindings": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_clip(root / "clip")
    make_captioner(root / "captioner")
    make_matcher(root / "matcher")
    return root


def job(folder: Path, policy: Path | None, **changes: Any) -> Job:
    families = {
        "embed": ("open_clip", "clip"),
        "caption": ("blip_caption", "captioner"),
        "match": ("blip_itm", "matcher"),
    }
    models = {role: {"family": family, "path": str(folder / name)} for role, (family, name) in families.items()}
    values = {"source": {"uri": "in"}, "catalog": {"uri": "out"}, "profile": "base", "models": models}
    return Job.model_validate({**values, "policy": policy and str(policy), **changes})


@pytest.fixture
def policy(tmp_path: Path, folder: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(POLICY, sort_keys=False))
    config = job(folder, None, tasks=["embed"]).models["embed"]
    write_binding(path, bind(load_policy(str(path)), identify("embed", config)))
    return path


def test_a_job_becomes_tasks_that_fill_a_row(folder: Path, policy: Path) -> None:
    settings = job(folder, policy)
    setup = pickle.loads(pickle.dumps(prepare_tasks(settings)))
    prompts = prepare_prompts(setup)
    pixels = [image.permute(1, 2, 0).numpy().tobytes() for image in random_pixels(3)]
    key = setup.requests["embed"].key
    batch = pa.table(
        {
            f"pixels_{key}": pa.array([[pixels[0]], [pixels[1], pixels[2]]], pa.list_(pa.binary())),
            f"views_{key}": pa.array([["squash"], ["squash", "center"]], pa.list_(pa.string())),
            "previous_caption": pa.nulls(2, pa.string()),
            "text": pa.array([None, "a red car"], pa.string()),
        }
    )
    for name in settings.tasks:
        task = load_task(name, setup, prompts, "cpu")
        columns, errors = run_contained(task, batch, BatchLimit())
        assert errors.null_count == 2, errors
        batch = add_columns(batch, task.writes, columns)
    rows = batch.to_pylist()
    assert [len(row["vectors"]) for row in rows] == [1, 2]
    assert all(row["decision"] in ("allow", "review", "block") for row in rows)
    assert all(row["caption"] and 0 <= row["caption_itm"] <= 1 for row in rows)
    assert [row["text_itm"] is None for row in rows] == [True, False]


def test_captioner_and_matcher_see_the_whole_image_alone(folder: Path, policy: Path) -> None:
    requests = prepare_tasks(job(folder, policy)).requests
    assert requests["embed"].views == ("squash", "center", "tiles", "black", "frames")
    assert requests["caption"].views == requests["match"].views == ("squash",)
    assert {request.size for request in requests.values()} == {IMAGE_SIZE}


def test_fingerprints_follow_the_settings_that_move_outputs(folder: Path, policy: Path) -> None:
    def fingerprints(**changes: Any) -> dict[str, str]:
        settings = job(folder, policy, **changes)
        return prepare_tasks(settings).fingerprints(settings.tasks)

    base = fingerprints()
    assert fingerprints() == base
    assert len(set(base.values())) == 4

    def moved(**changes: Any) -> set[str]:
        return {task for task, value in fingerprints(**changes).items() if value != base[task]}

    assert moved(views=["squash"]) == {"embed", "moderate"}
    assert moved(views=["frames", "black", "center", "squash", "tiles"]) == set(), "their order is nothing to a model"
    assert moved(max_caption_tokens=5) == {"caption"}
    assert moved(num_beams=3) == {"caption"}
    assert moved(limit=1) == set()

    model = identify("caption", job(folder, policy).models["caption"]).fingerprint("caption")
    assert base["caption"] == short_digest({"model": model, "max_tokens": 20}), "greedy captions are not due anew"


def test_a_query_is_compared_with_vectors_of_any_views_in_any_order(folder: Path) -> None:
    """Rows of earlier versions are marked with the order that the job file had."""
    settings = job(folder, None, tasks=["embed"])
    setup, known = prepare_tasks(settings), set(QueryEncoder(settings).fingerprints)
    for views in (("squash",), ("center", "squash"), ("frames", "squash", "tiles"), settings.views[::-1]):
        request = replace(setup.requests["embed"], views=views)
        marked = replace(setup, requests={**setup.requests, "embed": request}).fingerprints(("embed",))
        assert marked["embed"] in known


def test_beams_of_a_job_reach_its_captioner(folder: Path) -> None:
    settings = job(folder, None, tasks=["caption"], num_beams=3)
    setup = prepare_tasks(settings)
    pixels = random_pixels(33, seed=33)
    key = setup.requests["caption"].key
    views = [[image.permute(1, 2, 0).numpy().tobytes()] for image in pixels]
    batch = pa.table(
        {
            f"pixels_{key}": pa.array(views, pa.list_(pa.binary())),
            f"views_{key}": pa.array([["squash"]] * 33, pa.list_(pa.string())),
        }
    )
    captions = load_task("caption", setup, None, "cpu")(batch)["caption"].to_pylist()
    captioner = load_captioner(settings.models["caption"], "cpu")
    assert captions == captioner.caption(pixels, 20, 3)
    assert captions != captioner.caption(pixels, 20)


@pytest.mark.parametrize("family", ["vllm", "endpoint"])
def test_beams_for_a_captioner_that_has_none_stop_the_job(folder: Path, family: str) -> None:
    model = {"family": family, "path": str(folder / "captioner")}
    if family == "endpoint":
        model = {"family": family, "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "some-vlm"}}
    settings = job(folder, None, tasks=["caption"], num_beams=2, models={"caption": model})
    with pytest.raises(ConfigError, match=f"num_beams: 2, but captioners of the family {family}"):
        prepare_tasks(settings)
    assert prepare_tasks(settings.model_copy(update={"num_beams": 1})).num_beams == 1


def test_a_new_policy_does_not_move_the_fingerprint(folder: Path, policy: Path) -> None:
    before = prepare_tasks(job(folder, policy))
    policy.write_text(policy.read_text().replace("review: 0.5", "review: 0.4"))
    after = prepare_tasks(job(folder, policy))
    assert before.fingerprints(("moderate",)) == after.fingerprints(("moderate",))
    assert before.policy
    assert after.policy
    assert before.policy.digest != after.policy.digest


def test_a_policy_is_needed_and_must_be_bound(folder: Path, policy: Path) -> None:
    with pytest.raises(ConfigError, match="moderate needs one"):
        prepare_tasks(job(folder, None))
    policy.write_text(yaml.safe_dump(POLICY, sort_keys=False))
    with pytest.raises(UnboundPolicyError, match="no thresholds set for clip"):
        prepare_tasks(job(folder, policy))
    assert prepare_tasks(job(folder, policy, accept_unbound=True)).binding is None


def test_a_job_that_does_not_moderate_needs_no_policy(folder: Path) -> None:
    setup = prepare_tasks(job(folder, None, tasks=["embed", "caption"]))
    assert set(setup.models) == {"embed", "caption"}
    assert prepare_prompts(setup) is None
