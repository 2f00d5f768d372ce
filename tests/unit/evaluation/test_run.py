"""The job that an evaluation runs, made of the caller's."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from tests.catalog_samples import config_of
from tests.report_samples import label, labels_of, put_rows
from tests.vilbert import make_vilbert
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine.prepare import prepare
from vlmflow.errors import EvaluationError
from vlmflow.evaluation import measure
from vlmflow.evaluation.dataset import Dataset, EvaluationTask, table_of
from vlmflow.evaluation.run import Run, _job_for, scratch_catalog
from vlmflow.sources.uris import image_ids

CATALOG = CatalogConfig(uri="kept")
QUESTION = {"question_id": "1", "question": "what is it?", "answers": ["a dog"]}
COLUMNS: dict[EvaluationTask, dict[str, list[Any]]] = {
    "moderate": {"labels": [None], "flag": [True]},
    "answer": {"questions": [[QUESTION]]},
    "match": {"key": ["k"], "text": ["a dog"], "match": [True]},
}


def data(task: EvaluationTask) -> Dataset:
    return Dataset(task, "data.csv", table_of(task, {"uri": ["/a.png"], **COLUMNS[task]}))


def job(**changes: Any) -> Job:
    source = {"uri": "x.csv", "text_column": "title"}
    return Job.model_validate({"source": source, "catalog": {"uri": "y"}, "profile": "starter", **changes})


def test_detectors_keep_the_pool_that_the_job_gives_them() -> None:
    pools = [
        {"tasks": ["detect"], "gpus": 1},
        {"tasks": ["embed", "moderate", "caption"], "gpus": 0, "batch_size": 7},
    ]
    given = job(tasks=["embed", "moderate", "caption"], policy="demo", pools=pools)
    found = _job_for(given, data("moderate"), CATALOG).pools
    assert [(pool.tasks, pool.gpus) for pool in found] == [(("detect",), 1.0), (("embed", "moderate"), 0.0)]
    assert found[1].batch_size == 7


def test_detectors_have_no_place_where_nothing_is_moderated() -> None:
    pools = [{"tasks": ["detect"], "gpus": 1}, {"tasks": ["embed", "moderate", "match"]}]
    given = job(tasks=["embed", "moderate", "match"], policy="demo", pools=pools)
    assert [pool.tasks for pool in _job_for(given, data("match"), CATALOG).pools] == [("match",)]


def test_a_benchmark_is_asked_its_own_questions_alone() -> None:
    given = job(tasks=["answer"], questions=["is there a car?"])
    found = _job_for(given, data("answer"), CATALOG)
    assert found.questions == ()
    assert found.source.questions_column == "questions"


def test_classes_that_make_no_prompts_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(measure, "Run")
    ids = ["n01440764", "n01443537"]
    rows = table_of("zeroshot", {"uri": ["/a.png", "/b.png"], "class": ids})
    with pytest.raises(EvaluationError, match="ids of WordNet, such as n01440764"):
        measure.evaluate(Dataset("zeroshot", "data", rows, classes=tuple(ids)), job())


def test_models_of_regions_from_a_column_are_refused_by_name(tmp_path: Path) -> None:
    make_vilbert(tmp_path, {"kind": "columns", "max_regions": 6})
    source = {"uri": "x.parquet", "text_column": "title", "regions_column": "regions"}
    given = job(source=source, tasks=["match"], models={"match": {"family": "vilbert", "path": str(tmp_path)}})
    with pytest.raises(EvaluationError, match=r"models\.match reads regions from a column") as caught:
        _job_for(given, data("match"), CATALOG)
    assert "finds its regions itself" in caught.value.remedy


def test_of_moderation_the_models_decisions_are_measured_and_not_peoples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, uris = CatalogConfig(uri=str(tmp_path / "kept")), [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    given = job(tasks=["embed", "moderate"], policy="demo")
    rows = table_of("moderate", {"uri": uris, "labels": [["gun"], []], "flag": [True, False]})
    asked = Dataset("moderate", "data.csv", rows)
    prepared = prepare(_job_for(given, asked, kept))
    assert prepared.setup.policy is not None
    verdict = {"decision": "block", "reviewer": "ada", "model_decision": "allow", "model_reason": None}
    put_rows(
        kept, ["a", "b"], image_id=image_ids(uris), moderate_fingerprint=[prepared.fingerprints["moderate"]] * 2,
        policy_digest=[prepared.setup.policy.digest] * 2, labels=labels_of([[label("gun", 0.1, "allow")]] * 2),
        verdict=[verdict, None], decision=["block", "review"], decision_reason=["verdict", "weapons/gun"],
    )  # fmt: skip
    monkeypatch.setattr("vlmflow.evaluation.run.enrich", lambda *_, **__: None)  # all is there
    assert Run(given, asked, kept, None).column("decision")["decision"].to_pylist() == ["allow", "review"]


def test_a_scratch_catalog_leaves_nothing_where_it_was_asked_to_be(tmp_path: Path) -> None:
    with scratch_catalog(job(), str(tmp_path), "gate") as catalog:
        put_rows(catalog, ["a"])
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_what_a_killed_one_left_goes_with_the_next_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Folder(config_of(tmp_path))
    ours, others = "gate-20260301T020000-00000001", {"gate-golden/a.png", "evaluate-20260301T020000-00000001/runs/r"}
    for path in (f"{ours}/images/a.parquet", f"{ours}/runs/r.lease", *others):
        place.write(path, b"x")
    with scratch_catalog(job(), str(tmp_path), "gate"):
        assert ours in place.folders(), "its gate may be at work"
    monkeypatch.setattr("vlmflow.evaluation.run.UNKNOWN_RUN_AGE", dt.timedelta(seconds=-5))
    with scratch_catalog(job(), str(tmp_path), "gate") as catalog:
        put_rows(catalog, ["a"])
        assert ours not in place.folders()
    assert {info.path for info in place.list("")} == others
