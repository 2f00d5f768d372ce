"""What runs on a deployment: jobs that load, flows and automations that Prefect accepts as they stand in the files."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from prefect import Flow
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flows import load_flow_from_entrypoint
from rich.console import Console

from pipelines import alerts
from vlmflow.config import Job, load_job
from vlmflow.models.profiles import PROFILES
from vlmflow.moderation.policy import load_policy

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
JOBS = sorted((DEPLOY / "jobs").glob("*.yaml"))


@pytest.fixture(params=JOBS, ids=lambda path: path.stem)
def job(request: pytest.FixtureRequest) -> Job:
    return load_job(request.param, {})


def test_there_is_a_job_for_every_size() -> None:
    assert {path.stem for path in JOBS} == {"one-machine", "small-cluster", "large-cluster"}


def test_a_job_names_what_exists(job: Job) -> None:
    assert job.profile in PROFILES
    assert job.policy is not None
    assert load_policy(job.policy).name == job.policy
    # Its thresholds were set for the starter models alone: nothing is allowed before someone calibrates.
    assert job.accept_unbound


def test_a_job_on_a_cluster_connects_to_it(job: Job) -> None:
    is_local = not job.catalog.uri.startswith("s3://")
    assert job.ray.address == (None if is_local else "auto")


def deployments() -> list[dict[str, Any]]:
    said = Console(record=True, quiet=True)
    found, _ = _load_deploy_configs_and_actions(DEPLOY / "prefect.yaml", console=said)
    assert not said.export_text(), "Prefect leaves out what it does not understand"
    return list(found)


@pytest.fixture(params=deployments(), ids=lambda found: found["name"])
def deployment(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def test_the_three_flows_are_deployed() -> None:
    assert [found["name"] for found in deployments()] == ["nightly", "backfill", "adhoc"]
    file = yaml.safe_load((DEPLOY / "prefect.yaml").read_text(encoding="utf-8"))
    assert file["prefect-version"] == version("prefect")


def test_a_deployment_runs_a_flow_with_parameters_that_it_takes(deployment: dict[str, Any]) -> None:
    found = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(found, Flow)
    assert found.validate_parameters(deployment["parameters"])["job_file"]
    assert (ROOT / deployment["parameters"]["job_file"]).is_file()
    assert deployment["work_pool"]["name"] == "vlmflow"


def test_the_nightly_flow_has_a_schedule_and_never_runs_twice_at_once() -> None:
    nightly, *others = deployments()
    (schedule,) = nightly["schedules"]
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]).cron
    assert nightly["concurrency_limit"]["limit"] == 1
    assert not any(found.get("schedules") for found in others)


def test_automations_listen_to_what_the_flows_tell() -> None:
    data = yaml.safe_load((DEPLOY / "automations.yaml").read_text(encoding="utf-8"))
    found = [AutomationCore.model_validate(item) for item in data["automations"]]
    triggers = [automation.trigger for automation in found]
    assert all(isinstance(trigger, EventTrigger) for trigger in triggers)
    assert triggers[0].expect == {alerts.FLAGGED_JUMP, alerts.UNRECONCILED, alerts.REGRESSION}
    nightly = load_flow_from_entrypoint(deployments()[0]["entrypoint"])
    assert triggers[1].match_related["prefect.resource.name"] == [nightly.name]
    # A day, and time for the run.
    assert triggers[1].within.total_seconds() > 24 * 3600


def test_the_constraints_pin_what_the_image_installs() -> None:
    lines = (DEPLOY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert pin.specifier.contains(version(pin.name)), f"{pin}, installed is {version(pin.name)}"
    assert {"ray", "torch", "prefect", "prefect-kubernetes"} <= {pin.name for pin in pins}


def test_the_readme_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\bdeploy/[\w./-]+\.(?:yaml|yml|json|sh|txt|example)\b", text):
        assert (ROOT / name).is_file(), name
    tags = set(re.findall(r"vlmflow:(\d\S+?)-(?:cpu|cuda)", text))
    assert tags == {version("vlmflow")}
