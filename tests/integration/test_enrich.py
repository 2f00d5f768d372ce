"""The main job, end to end: real Ray, real Delta tables, real model code with tiny weights."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.catalog_samples import rows_of
from tests.pictures import picture, write_broken, write_pictures
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job, ModelConfig, PoolConfig
from vlmflow.engine import RunReport, enrich, plan
from vlmflow.engine import run as run_module
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.pipeline import check_pools
from vlmflow.errors import (
    CatalogError,
    ClusterError,
    ColumnsError,
    CommitError,
    EmptySourceError,
    ErrorBudgetError,
    UnboundPolicyError,
    WeightsError,
)
from vlmflow.models import identify
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup

pytestmark = pytest.mark.usefixtures("ray_session")

# What differs between two runs over the same images.
VOLATILE = ("run_id", "read_at", "updated_at", "embed_run_id", "attempt_digest")


@dataclass(frozen=True)
class Enriched:
    """A folder of images good and broken, enriched by one run of all tasks."""

    job: Job
    good: list[Path]
    broken: dict[str, str]  # the error class by name
    report: RunReport


@pytest.fixture(scope="module")
def enriched(
    make_job_in: Callable[..., Job], real: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Enriched:
    """By real architectures, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("enriched")
    good, broken = write_pictures(folder / "images", 14), write_broken(folder / "images")
    job = make_job_in(folder, folder / "images", date=dt.date(2026, 11, 1), **real)
    return Enriched(job, good, broken, enrich(job))


def rows_by_name(catalog: Catalog) -> dict[str, dict[str, object]]:
    rows = catalog.images().drop_columns(list(VOLATILE)).to_pylist()
    named = {str(row["uri"]).rsplit("/", 1)[-1]: row for row in rows}
    assert len(named) == len(rows)
    return named


def differences(
    left: dict[str, dict[str, object]], right: dict[str, dict[str, object]]
) -> dict[tuple[str, str], tuple[object, object]]:
    """What two sets of rows differ in, by name and column; scores to 1e-5, because batches are cut differently."""
    assert left.keys() == right.keys()
    return {
        (name, column): (value, right[name][column])
        for name, row in left.items()
        for column, value in row.items()
        if not are_close(value, right[name][column])
    }


def are_close(left: object, right: object) -> bool:
    """Equal, the floats in them to 1e-5."""
    if isinstance(left, float) and isinstance(right, float):
        return abs(left - right) < 1e-5
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(are_close, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(are_close(value, right[key]) for key, value in left.items())
    return left == right


def test_every_file_has_its_row_good_or_broken(enriched: Enriched) -> None:
    job, good, broken, report = enriched.job, enriched.good, enriched.broken, enriched.report
    rows = rows_by_name(Catalog.open(job.catalog))
    assert set(rows) == {path.name for path in good} | set(broken)
    for path in good:
        row = rows[path.name]
        assert row["status"] == "ok", row["errors"]
        assert row["decision"] in {"allow", "review", "block"}
        assert isinstance(row["caption"], str)
        assert 0 <= row["caption_itm"] <= 1
        assert -1 <= row["caption_itc"] <= 1
        assert row["text_itm"] is None
        assert {label["label"] for label in row["labels"]} == {"gun", "bottle"}
        assert row["ingest_date"] == dt.date(2026, 11, 1)
    for name, error_class in broken.items():
        assert rows[name]["status"] == "unreadable"
        assert [error["class"] for error in rows[name]["errors"]] == [error_class], name
        assert rows[name]["decision"] == "review"
    assert report.status == "done"
    assert report.num_added == len(rows)
    assert report.statuses == {"ok": len(good), "unreadable": len(broken)}
    assert report.errors == dict.fromkeys(broken.values(), 1)
    assert {stage.stage for stage in report.stages} == {"read", "decode", "feed", *job.tasks}
    assert report.bytes_read == sum(path.stat().st_size for path in good[0].parent.iterdir())


def test_one_vector_for_each_view_of_each_good_image(enriched: Enriched) -> None:
    catalog = Catalog.open(enriched.job.catalog)
    images = {row["image_id"]: row for row in catalog.images().to_pylist()}
    views: dict[str, set[str]] = {}
    for row in catalog.embeddings().to_pylist():
        views.setdefault(row["image_id"], set()).add(row["view"])
        assert sum(value**2 for value in row["vector"]) == pytest.approx(1.0, abs=1e-5)
    assert set(views) == {image_id for image_id, row in images.items() if row["status"] == "ok"}
    for image_id, names in views.items():
        width, height = images[image_id]["width"], images[image_id]["height"]
        expected = {"squash"} if width == height else {"squash", "center"}
        if max(width, height) >= 2 * min(width, height):
            expected |= {"tile-1", "tile-2", "tile-3"}
        assert names == expected


def test_a_second_run_does_nothing_and_says_so(enriched: Enriched) -> None:
    version = Catalog.open(enriched.job.catalog).version
    report = enrich(enriched.job)
    assert report.status == "nothing_due"
    assert report.num_unchanged == len(enriched.good) + len(enriched.broken)
    assert Catalog.open(enriched.job.catalog).version == version


def test_a_changed_image_replaces_its_row_and_a_touched_one_only_moves_its_version(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    paths = write_pictures(tmp_path / "images", 6)
    job = make_job(tmp_path / "images")
    enrich(job)
    before = rows_by_name(Catalog.open(job.catalog))
    touched, changed = paths[0], paths[2]
    data = touched.read_bytes()
    touched.unlink()
    touched.write_bytes(data)
    picture(99).save(changed, "WEBP")
    picture(50).save(tmp_path / "images" / "new.png", "PNG")

    report = enrich(job)

    after = rows_by_name(Catalog.open(job.catalog))
    assert (report.num_added, report.num_replaced) == (1, 2)
    assert after[changed.name]["content_hash"] != before[changed.name]["content_hash"]
    assert {name for name in before if before[name] != after[name]} == {touched.name, changed.name}
    moved = {column for column, value in before[touched.name].items() if value != after[touched.name][column]}
    assert "object_version" in moved
    assert moved <= {"object_version", "seen_version", "attempts", "attempt_digest"}
    worked = {stage.stage: stage.images for stage in report.stages if stage.stage not in {"read", "decode", "feed"}}
    assert worked == dict.fromkeys(job.tasks, 2), "the changed and the new one, not the touched"


def test_tasks_added_later_fill_the_same_row(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 6)
    write_broken(tmp_path / "images")
    at_once = make_job(tmp_path / "images", date=dt.date(2026, 11, 1))
    enrich(at_once)
    stepwise = at_once.model_copy(update={"catalog": CatalogConfig(uri=str(tmp_path / "stepwise"))})
    enrich(stepwise.model_copy(update={"tasks": ("embed",)}))
    decided = Catalog.open(stepwise.catalog).images(["decision", "decision_reason"]).to_pylist()
    assert {tuple(row.values()) for row in decided} == {("review", "unscored")}, "no image is decided by nothing"
    for tasks in (("embed", "moderate", "caption"), ("caption", "match")):
        enrich(stepwise.model_copy(update={"tasks": tasks}))
    in_steps = rows_by_name(Catalog.open(stepwise.catalog))
    assert differences(in_steps, rows_by_name(Catalog.open(at_once.catalog))) == {}


def test_the_callers_columns_and_text_come_along(make_job: Callable[..., Job], tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "images", 3)
    manifest = tmp_path / "images" / "list.jsonl"
    listed = [
        {"uri": path.name, "title": f"a red car {index}", "price": index + 0.5} for index, path in enumerate(paths)
    ]
    gone = {"uri": "gone.jpg", "title": "nothing", "price": 1.0}
    manifest.write_text("\n".join(json.dumps(entry) for entry in [*listed, gone]), encoding="utf-8")
    job = make_job(manifest, source_options={"text_column": "title"})
    enrich(job)
    rows = rows_by_name(Catalog.open(job.catalog))
    assert rows[paths[1].name]["source"] == {"title": "a red car 1", "price": 1.5}
    assert 0 <= rows[paths[1].name]["text_itm"] <= 1
    assert rows["gone.jpg"]["status"] == "missing"

    listed[1]["title"] = "a blue car"
    manifest.write_text("\n".join(json.dumps(entry) for entry in [*listed, listed[0]]), encoding="utf-8")
    again = plan(job)
    assert again.due["match"] == {"text_changed": 1}
    assert (again.num_listed, again.num_duplicates) == (3, 1)

    cheap = [entry | {"price": "cheap"} for entry in listed]
    manifest.write_text("\n".join(json.dumps(entry) for entry in cheap), encoding="utf-8")
    with pytest.raises(CatalogError, match="price"):
        plan(job)


@pytest.mark.slow
def test_new_prices_come_into_the_rows_and_no_image_is_read_for_them(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.name for path in write_pictures(tmp_path / "images", 4)]
    manifest = tmp_path / "images" / "list.csv"

    def list_at(price: int, names: Sequence[str]) -> None:
        lines = [f"{name},{price},title of {name}" for name in names]
        manifest.write_text("\n".join(["uri,price,title", *lines]), encoding="utf-8")

    job = make_job(manifest, tasks=("embed", "moderate"))
    list_at(1, names[:3])
    enrich(job)
    before = rows_of(job)
    list_at(2, names[:3])
    assert (plan(job).num_outdated, plan(job).outdated_columns) == (3, {"price": 3})
    with monkeypatch.context() as without_ray:
        without_ray.setattr(run_module, "ray_cluster", None)
        report = enrich(job)
    assert (report.status, report.num_columns_updated, report.num_unchanged) == ("nothing_due", 3, 3)
    record = Catalog.open(job.catalog).runs.get(report.run_id) or {}
    assert (record["status"], record["num_columns_updated"]) == ("nothing_due", 3)
    after = rows_of(job)
    for name in names[:3]:
        assert after[name]["source"] == {"price": "2", "title": f"title of {name}"}
        assert after[name]["updated_at"] > before[name]["updated_at"]
        assert after[name] == before[name] | {key: after[name][key] for key in ("source", "updated_at")}
    assert Catalog.open(job.catalog).flagged_before(report.run_id) is not None
    version = Catalog.open(job.catalog).version
    assert enrich(job).num_columns_updated == 0
    assert Catalog.open(job.catalog).version == version

    # What is computed stands first: columns that cannot be updated cost none of it.
    list_at(3, names)
    with monkeypatch.context() as in_the_way:
        in_the_way.setattr(Catalog, "update_columns", _other_writers_win)
        with pytest.raises(ColumnsError, match="columns of 3 of 3 rows were not updated: other writers") as raised:
            enrich(job)
    assert "What the run computed is in the catalog" in raised.value.remedy
    assert {name: row["source"]["price"] for name, row in rows_of(job).items()} == dict.fromkeys(names[:3], "2") | {
        names[3]: "3"
    }
    newest = next(Catalog.open(job.catalog).runs.newest())
    assert (newest.record["status"], newest.record["num_added"]) == ("failed", 1)
    assert enrich(job).num_columns_updated == 3
    assert {row["source"]["price"] for row in rows_of(job).values()} == {"3"}


def _other_writers_win(*_: object) -> Iterator[tuple[int, int]]:
    raise CommitError("other writers won", remedy="Run the same command again.")


@pytest.mark.slow
def test_two_pools_give_the_rows_of_one(enriched: Enriched, make_job: Callable[..., Job], real: dict[str, Any]) -> None:
    pools = (
        {"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 4},
        {"tasks": ("caption", "match"), "cpus": 0.5, "batch_size": 3},
    )
    two = make_job(enriched.job.source.uri, pools=pools, **real)
    report = enrich(two)
    assert {pool.tasks for pool in report.pools} == {("embed", "moderate"), ("caption", "match")}
    first, second = rows_by_name(Catalog.open(enriched.job.catalog)), rows_by_name(Catalog.open(two.catalog))
    assert first.keys() == second.keys()
    for name, row in first.items():
        assert row["caption"] == second[name]["caption"]
        assert row["decision"] == second[name]["decision"]
        assert row["caption_itm"] == pytest.approx(second[name]["caption_itm"], abs=1e-5)


def test_commits_come_by_rows_and_the_last_is_not_forgotten(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 70)
    job = make_job(tmp_path / "images", tasks=("embed",), commit={"max_rows": 20})
    report = enrich(job)
    assert sum(commit.rows for commit in report.commits) == 70
    assert len(report.commits) >= 2
    assert Catalog.open(job.catalog).images().num_rows == 70


@pytest.mark.slow
def test_a_limit_takes_so_many_and_the_next_run_the_others_with_the_prompts_of_the_first(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "images", 7)
    encoded: list[TaskSetup] = []
    encode = run_module.encode_policy

    def counted(setup: TaskSetup) -> PromptVectors | None:
        encoded.append(setup)
        return encode(setup)

    monkeypatch.setattr(run_module, "encode_policy", counted)
    job = make_job(tmp_path / "images", tasks=("embed", "moderate"))
    assert enrich(job.model_copy(update={"limit": 3})).num_added == 3
    assert enrich(job).num_added == 4
    assert len(encoded) == 1


def test_an_empty_source_writes_nothing(make_job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    job = make_job(tmp_path / "images")
    with pytest.raises(EmptySourceError):
        enrich(job)
    assert not (tmp_path / "catalog").exists()


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(
    make_job: Callable[..., Job], models: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "images", 2)
    captioner = tmp_path / "captioner"
    shutil.copytree(models["caption"]["path"], captioner)
    shutil.copy(Path(models["match"]["path"]) / "model.safetensors", captioner)
    wrong = {"caption": {"family": "blip_caption", "path": str(captioner)}}
    job = make_job(tmp_path / "images", tasks=("caption",), models=wrong)
    with pytest.raises(WeightsError, match=str(captioner)):
        enrich(job)
    assert not (tmp_path / "catalog").exists()


def test_a_node_that_decodes_otherwise_ends_the_run(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one without an extra: what it cannot read would be recorded as unreadable to all."""
    write_pictures(tmp_path / "images", 2)
    monkeypatch.setattr("vlmflow.engine.nodes.DECODER_VERSION", "4-pillow99+heif")
    job = make_job(tmp_path / "images", tasks=("embed",))
    with pytest.raises(
        ClusterError, match=r"decoded by 4-pillow\d+\+heif\+video, and .* planned with 4-pillow99"
    ) as caught:
        enrich(job)
    assert "vlmflow's extras heif and video, on every node" in caught.value.remedy
    assert Catalog.open(job.catalog).images().num_rows == 0


def test_pools_that_can_never_start_are_refused() -> None:
    pools = (PoolConfig(tasks=("embed",), gpus=1),)
    cluster = Cluster(cpus=2, gpus=0, num_nodes=1, embedded=True)
    with pytest.raises(ClusterError, match="1 GPUs"):
        check_pools(pools, cluster)
    check_pools((PoolConfig(tasks=("embed",), cpus=0.5, min_actors=3, max_actors=3),), cluster)


def test_an_unbound_policy_stops_before_anything(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 2)
    policy = tmp_path / "unbound.yaml"
    text = Path(make_job("x").policy).read_text(encoding="utf-8")
    policy.write_text(text[: text.index("bindings:")] + "bindings: []\n", encoding="utf-8")
    job = make_job(tmp_path / "images", policy=str(policy))
    with pytest.raises(UnboundPolicyError):
        enrich(job)
    assert not (tmp_path / "catalog").exists()


def test_a_wrong_prefix_stops_before_the_first_commit(make_job: Callable[..., Job], tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri\n" + "\n".join(f"none/{index}.jpg" for index in range(1_100)), encoding="utf-8")
    job = make_job(manifest, tasks=("embed",), commit={"max_rows": 300})
    with pytest.raises(ErrorBudgetError, match="missing"):
        enrich(job)
    assert Catalog.open(job.catalog).images().num_rows == 0


def test_the_run_is_on_record_with_its_versions_and_its_policy(enriched: Enriched) -> None:
    job, report = enriched.job, enriched.report
    catalog = Catalog.open(job.catalog)
    (info,) = catalog.runs.list()
    assert (info.run_id, info.state) == (report.run_id, "finished")
    assert info.record["versions"]["ray"]
    assert info.record["config"]["profile"] == "starter"
    (digest,) = catalog.images(["policy_digest"])["policy_digest"].drop_null().unique().to_pylist()
    weights = identify("embed", ModelConfig(**job.models["embed"].model_dump())).weights_digest
    assert set(catalog.policies.get(digest)) == {"policy.json", f"prompts-{weights[:16]}.safetensors"}
