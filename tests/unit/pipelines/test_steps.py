"""Steps as command lines with files, and what their output is taken for."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed

from pipelines import common, steps
from pipelines.ray_jobs import Attempt, Command, JobStatus
from pipelines.steps import (
    JOB_FILE,
    Golden,
    OnCluster,
    Output,
    check_command,
    doctor_command,
    enrich_command,
    gate_command,
    job_files,
    plan_command,
    remoderate_command,
)
from vlmflow.checks import Check
from vlmflow.cli import app
from vlmflow.config import Job
from vlmflow.engine import progress as shown
from vlmflow.engine.progress import ProgressDisplay, Tally
from vlmflow.engine.scope import Scope
from vlmflow.errors import (
    ClusterError,
    ConfigError,
    ErrorBudgetError,
    StoreLostError,
    SubmittedJobError,
    TransientError,
    UnreconciledError,
    VlmflowError,
)
from vlmflow.gate import GateLimits
from vlmflow.views import check_as_json

POLICY = """
name: test
version: "1"
neutral: [a picture of a car]
logistic: {scale: 20.0, offset: 0.0}
categories: [{name: weapons, labels: [{name: gun, prompts: [a gun], review: 0.4, block: 0.9}]}]
bindings: []
"""
DETECTOR = """
detectors:
  - name: guns
    family: image_classification
    path: PLACE
    outputs: {gun: {category: weapons, label: gun, review: 0.4, block: 0.9}}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose every path is relative to a folder that the cluster knows nothing of."""
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(POLICY, encoding="utf-8")
    return Job(
        source={"uri": "images"},
        catalog={"uri": "catalog"},
        profile="starter",
        policy="policy.yaml",
        models={"embed": {"family": "open_clip", "path": "clip"}},
        models_dir="models",
        date=dt.date(2026, 11, 1),
    )


def test_a_job_travels_with_its_policy_and_without_relative_paths(job: Job, tmp_path: Path) -> None:
    files = job_files(job)
    assert files.keys() == {JOB_FILE, "policy.yaml"}
    data = yaml.safe_load(files[JOB_FILE])
    assert data["source"]["uri"] == str(tmp_path / "images")
    assert data["catalog"]["uri"] == str(tmp_path / "catalog")
    assert data["models_dir"] == str(tmp_path / "models")
    assert data["models"]["embed"]["path"] == str(tmp_path / "clip")
    assert (data["policy"], data["date"], data["ray"]) == ("policy.yaml", "2026-11-01", {"address": "auto"})
    assert Job.model_validate(data).tasks == job.tasks


def test_a_policy_of_the_job_file_s_name_does_not_take_its_place(job: Job) -> None:
    Path("policy.yaml").rename(JOB_FILE)
    files = job_files(job.model_copy(update={"policy": JOB_FILE}))
    policy = yaml.safe_load(files[JOB_FILE])["policy"]
    assert yaml.safe_load(files[JOB_FILE])["source"]
    assert files[policy] == POLICY


def test_a_detector_s_folder_that_the_cluster_would_look_for_elsewhere_is_refused(job: Job) -> None:
    whole = POLICY + DETECTOR.replace("PLACE", "/models/guns")
    Path("policy.yaml").write_text(whole, encoding="utf-8")
    assert job_files(job)["policy.yaml"] == whole  # as it stands: its digest is in the rows
    Path("policy.yaml").write_text(POLICY + DETECTOR.replace("PLACE", "models/guns"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"policy policy.yaml: detector guns: path models/guns is relative"):
        job_files(job)


@pytest.mark.parametrize("uri", ["s3://bucket/a", "gs://bucket/a", "https://host/a.csv"])
def test_addresses_in_stores_stay(job: Job, uri: str) -> None:
    moved = job.model_copy(update={"source": job.source.model_copy(update={"uri": uri}), "policy": "baseline"})
    files = job_files(moved)
    assert files.keys() == {JOB_FILE}
    assert yaml.safe_load(files[JOB_FILE])["source"]["uri"] == uri


def commands(job: Job, tmp_path: Path) -> list[Command]:
    accepted = tmp_path / "accepted.json"
    accepted.write_text("{}", encoding="utf-8")
    golden = Golden(uri="golden", accepted=accepted, scratch="scratch", limits=GateLimits(max_margin_shift=0.5))
    scope = Scope(dt.date(2026, 11, 1), dt.date(2026, 11, 1), "width > 10")
    return [
        doctor_command(job),
        plan_command(job),
        enrich_command(job),
        check_command(job, "width > 10", None),
        gate_command(job, golden),
        remoderate_command(job, scope, None, dry_run=True),
        remoderate_command(job, scope, "abc", dry_run=False),
    ]


def test_every_command_is_one_that_the_command_line_knows(job: Job, tmp_path: Path) -> None:
    import typer.main

    for command in commands(job, tmp_path):
        found: Any = typer.main.get_command(app)
        arguments = list(command.arguments)
        while hasattr(found, "commands"):
            found = found.commands[arguments.pop(0)]
        with found.make_context(found.name, arguments) as context:
            assert context.params["as_json"] is True
    assert len({command.name for command in commands(job, tmp_path)}) == 7


def test_local_paths_of_a_command_are_whole(job: Job, tmp_path: Path) -> None:
    *_, gate, dry, _ = commands(job, tmp_path)
    assert str(tmp_path / "golden") in gate.arguments
    assert str(tmp_path / "scratch") in gate.arguments
    assert gate.files["accepted.json"] == "{}"
    assert gate.arguments[gate.arguments.index("--max-margin-shift") + 1] == "0.5"
    assert str(tmp_path / "catalog") in dry.arguments
    assert dry.arguments[-1] == "--dry-run"


class Display:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.tallies: list[Tally] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def update(self, tally: Tally) -> None:
        self.tallies.append(tally)

    def close(self) -> None:
        """Does nothing."""


def test_progress_reports_and_log_are_told_apart() -> None:
    display, logged = Display(), list[str]()
    progress: ProgressDisplay = display
    output = Output(logged.append, progress)
    for line in (
        json.dumps({"event": "stage", "stage": "loading models"}),
        json.dumps({"event": "progress", "total": 9, "done": 5, "committed": 4, "images_per_s": 2.5}),
        "2026-11-01 INFO something",
        "  ",
        '{"broken": ',
        "[1, 2]",
        json.dumps({"event": "report", "num_listed": 9}),
    ):
        output.take(line)
    assert display.stages == ["loading models"]
    assert (display.tallies[0].total, display.tallies[0].committed, display.tallies[0].elapsed_s) == (9, 4, 2.0)
    assert logged == ["2026-11-01 INFO something", '{"broken": ', "[1, 2]"]
    assert output.objects == [{"num_listed": 9}]


class FakeJobs:
    """Jobs whose log is given; the last status too."""

    def __init__(self, lines: list[str], status: JobStatus = JobStatus.SUCCEEDED, message: str = "") -> None:
        self._lines = lines
        self._attempt = Attempt("vlmflow-x-000000000000-1", "vlmflow-x-000000000000", 1, status, "me", 1.0, 0, message)

    def start(self, *_: Any, **__: Any) -> Attempt:
        return self._attempt

    def follow(self, attempt: Attempt, on_line: Callable[[str], None], **_: Any) -> Attempt:
        for line in self._lines:
            on_line(line)
        return attempt


def on_cluster(monkeypatch: pytest.MonkeyPatch, jobs: FakeJobs) -> OnCluster:
    monkeypatch.setattr(steps, "RayJobs", lambda _: jobs)
    return OnCluster("http://head:8265", owner="me", on_line=lambda _: None, deadline_s=1)


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("TransientError", TransientError),
        ("UnreconciledError", UnreconciledError),
        ("StrEnum", SubmittedJobError),  # what the module imports is no class of errors
        ("__builtins__", SubmittedJobError),
        ("NoSuchError", SubmittedJobError),
    ],
)
def test_an_error_keeps_its_class(
    monkeypatch: pytest.MonkeyPatch, job: Job, name: str, raised: type[VlmflowError]
) -> None:
    line = json.dumps({"event": "error", "class": name, "message": "it broke", "remedy": "Mend it."})
    with pytest.raises(raised, match="Ray job vlmflow-x-000000000000-1: it broke") as caught:
        on_cluster(monkeypatch, FakeJobs([line], JobStatus.FAILED)).plan(job)
    assert caught.value.remedy == "Mend it."


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_a_job_that_says_nothing_is_named_with_what_ray_says(
    monkeypatch: pytest.MonkeyPatch, job: Job, status: JobStatus
) -> None:
    jobs = FakeJobs(["Traceback ..."], status, "Job supervisor died\n\nThe node was lost.\n")
    with pytest.raises(SubmittedJobError, match=f"{status.value.lower()}: The node was lost."):
        on_cluster(monkeypatch, jobs).plan(job)


def test_a_report_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    jobs = FakeJobs([json.dumps({"event": "report", "num_pictures": 3})])
    with pytest.raises(SubmittedJobError, match="num_pictures: unknown key") as caught:
        on_cluster(monkeypatch, jobs).plan(job)
    assert "version" in caught.value.remedy


def test_checks_that_fail_are_shown_although_the_job_failed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    found = [Check("gpu", "fail", "none", "Get one."), Check("source", "fail", "throttling", may_pass=True)]
    lines = [check_as_json(check) for check in found]
    assert on_cluster(monkeypatch, FakeJobs(lines, JobStatus.FAILED)).doctor(job) == found


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (TransientError("store busy"), True),
        (StoreLostError("store gone"), True),
        (ClusterError("no answer"), True),
        (ConfigError("bad input"), False),
        (ErrorBudgetError("too many"), False),
        (SubmittedJobError("failed"), False),
        (ValueError("a mistake of ours"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    nothing: Any = None
    assert common.may_pass(nothing, nothing, Failed(data=error)) is again
    assert common.may_pass(nothing, nothing, Completed(data=1)) is False


@pytest.mark.parametrize(
    "fault", [httpx.ConnectError("refused"), RuntimeError("Failed to reach API"), ObjectNotFound(KeyError("artifact"))]
)
def test_a_server_that_is_away_fails_no_run_and_is_told_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    told: list[float] = []

    def tell(*_: Any, **__: Any) -> None:
        told.append(clock[0])
        if clock[0] < 600:
            raise fault

    clock = [0.0]
    for module in (common, shown):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(common, "create_progress_artifact", lambda *_, **__: uuid4())
    monkeypatch.setattr(common, "update_progress_artifact", tell)
    progress = common.RunProgress("enrich-x")
    progress.show(0.0, "begins")
    with caplog.at_level(logging.INFO, "vlmflow"):
        for clock[0] in range(5, 1000, 5):
            progress.update(Tally(total=1000, done=int(clock[0]), committed=int(clock[0])))
    # Once, and when ten minutes are over, in which the run went on and logged where it is.
    assert told[:3] == [5, 605, 615]
    assert caplog.text.count("enrich-x is not shown: Prefect's server cannot be told") == 1
    assert caplog.text.count("/1,000 images") > 90


def test_the_last_counts_of_a_run_stand_in_the_log_of_its_flow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    percents: list[float] = []
    monkeypatch.setattr(common.RunProgress, "show", lambda self, percent, text: percents.append(percent))
    progress, tally = common.RunProgress("enrich-x"), Tally(total=4, done=2)
    with caplog.at_level(logging.INFO, "vlmflow"):
        progress.update(tally)
        tally.done, tally.committed = 4, 3  # of one another run keeps the row
        progress.update(tally)
        progress.stage("compacting")
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "2/4 images, 0 saved",
        "4/4 images, 3 saved",
        "compacting",
    ]
    assert percents == [0.0, 75.0]


@pytest.mark.parametrize("uri", ["s3://Bucket/My Catalog/", "/", "", "ä" * 300, "a/../b", "x|y`z", "s3://b/---"])
def test_a_catalog_has_a_key_of_plain_characters(uri: str) -> None:
    from prefect.client.schemas.actions import ArtifactCreate

    key = f"backfill-partitions-{common.slug(uri)}"
    assert ArtifactCreate(key=key).key == key
    assert len(key) < 80


def test_catalogs_of_one_name_have_keys_of_their_own() -> None:
    assert common.slug("s3://a/catalog") != common.slug("s3://b/catalog")
    assert common.slug("s3://a/catalog").startswith("catalog-")


def test_the_date_is_that_of_the_schedule_in_utc() -> None:
    scheduled = dt.datetime(2026, 11, 1, 23, 30, tzinfo=dt.timezone(dt.timedelta(hours=-5)))
    assert common.logical_date(None, scheduled) == dt.date(2026, 11, 2)
    assert common.logical_date(dt.date(2026, 1, 1), scheduled) == dt.date(2026, 1, 1)
