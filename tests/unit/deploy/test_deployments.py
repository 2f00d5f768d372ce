"""What runs on a deployment: jobs that load, flows and automations that Prefect accepts as they stand in the files."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import re
import sysconfig
import tomllib
from collections.abc import Collection, Iterator
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect import Flow
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.server.database import provide_database_interface
from prefect.server.events import triggers
from prefect.server.events.models.automations import create_automation
from prefect.server.events.schemas.automations import Automation
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings
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


def test_the_nightly_flow_has_a_schedule() -> None:
    nightly, *others = deployments()
    (schedule,) = nightly["schedules"]
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]).cron
    # Deployed anew, one without a slug is made anew, and one that says it is active wakes up.
    assert schedule["slug"]
    assert "active" not in schedule
    assert not any(found.get("schedules") for found in others)


def test_no_flow_run_depends_on_what_the_server_keeps_in_memory(deployment: dict[str, Any]) -> None:
    assert "concurrency_limit" not in deployment


def automations() -> list[dict[str, Any]]:
    data = yaml.safe_load((DEPLOY / "automations.yaml").read_text(encoding="utf-8"))
    return list(data["automations"])


def test_automations_listen_to_what_the_flows_tell() -> None:
    found = [AutomationCore.model_validate(item).trigger for item in automations()]
    assert all(isinstance(trigger, EventTrigger) for trigger in found)
    assert found[0].expect == {alerts.FLAGGED_JUMP, alerts.UNRECONCILED, alerts.REGRESSION}
    nightly = deployments()[0]
    names = {"flow": load_flow_from_entrypoint(nightly["entrypoint"]).name, "deployment": nightly["name"]}
    assert isinstance(found[1].match_related, list)
    matched = {item["prefect.resource.role"][0]: item["prefect.resource.name"][0] for item in found[1].match_related}
    assert matched == names
    # A day, and time for the run.
    assert found[1].within.total_seconds() > 24 * 3600


MADE_AT = dt.datetime(2026, 11, 2, 9, tzinfo=dt.UTC)  # a Monday


@pytest.fixture
def prefect_database(tmp_path: Path) -> Iterator[None]:
    """A database of Prefect's server, with what automations need of it."""

    async def make_tables() -> None:
        database = provide_database_interface()
        tables = [table for table in database.Base.metadata.sorted_tables if table.name.startswith("automation")]
        async with (await database.engine()).begin() as connection:
            await connection.run_sync(lambda sync: database.Base.metadata.create_all(sync, tables=tables))

    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/prefect.db"}):
        asyncio.run(make_tables())
        yield
    triggers.triggers.clear()
    triggers.automations_by_id.clear()


def run_completed(at: dt.datetime, deployment: str | None) -> ReceivedEvent:
    """What Prefect's server says of a nightly run that a deployment, if any, has brought to its end."""
    names = {"flow": "nightly-enrichment"} | ({} if deployment is None else {"deployment": deployment})
    related = [
        {
            "prefect.resource.role": role,
            "prefect.resource.name": name,
            "prefect.resource.id": f"prefect.{role}.{uuid4()}",
        }
        for role, name in names.items()
    ]
    return ReceivedEvent(
        occurred=at, received=at, event="prefect.flow-run.Completed", id=uuid4(), related=related,
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
    )  # fmt: skip


async def told_of_missing_nights(nights: Collection[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When Prefect's server acts on the second automation in a week in which nights were completed at 03:00.

    Every night the flow is completed for another catalog too, by another deployment and by hand without one.

    Args:
        nights: days of the month on which one was.
    """
    automation = Automation(id=uuid4(), **automations()[1] | {"actions": [{"type": "do-nothing"}]})
    fired: list[str] = []

    async def fire(session: object, firing: object) -> None:
        fired.append(f"{now:%a %H:%M}")

    monkeypatch.setattr(triggers, "fire", fire)
    async with provide_database_interface().session_context(begin_transaction=True) as session:
        await create_automation(session, automation)
    triggers.load_automation(automation)
    (trigger,) = [one for one in triggers.triggers.values() if one.automation.id == automation.id]
    due = MADE_AT
    for hour in range(7 * 24):
        now = MADE_AT + dt.timedelta(hours=hour)
        completed = ["other", None] + (["nightly"] if now.day in nights else []) if now.hour == 3 else []
        for deployment in completed:
            await triggers.reactive_evaluation(run_completed(now, deployment))
            await triggers.reset_events_clock()
        if now >= due:
            due = await triggers.proactive_evaluation(trigger, now)
    triggers.forget_automation(automation.id)
    return fired


@pytest.mark.usefixtures("prefect_database")
@pytest.mark.parametrize(
    ("nights", "told"),
    [
        ({3, 4, 5, 6, 7, 8, 9}, []),
        ({3, 4, 5, 7, 8, 9}, ["Fri 05:00"]),  # the night to Friday, the 6th
        ({3, 4, 5, 8, 9}, ["Fri 05:00"]),
        (set(), ["Tue 11:00", "Thu 15:00", "Sat 19:00"]),
    ],
)
def test_one_missed_night_is_told_of(nights: set[int], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(told_of_missing_nights(nights, monkeypatch)) == told


def test_the_constraints_pin_what_is_installed_here() -> None:
    """The versions that the image gets, or the lowest that are allowed; not some in between that nobody has tried."""
    wrong = {
        name: [f"{pin}, installed is {installed(pin)}" for pin in pins(name) if installed(pin) not in pin.specifier]
        for name in ("constraints.txt", "constraints-lowest.txt")
    }
    assert [] in wrong.values(), wrong
    assert {"ray", "torch", "prefect", "prefect-kubernetes"} <= {pin.name for pin in pins("constraints.txt")}


def test_the_lowest_constraints_are_the_lower_ends_of_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [project["dependencies"], *(extras[name] for name in extras if name != "dev")]
    lowest = {canonicalize_name(pin.name): pin.specifier for pin in pins("constraints-lowest.txt")}
    for requirement in map(Requirement, itertools.chain(*asked)):
        (low,) = (one.version for one in requirement.specifier if one.operator == ">=")
        pinned = lowest[canonicalize_name(requirement.name)]
        assert pinned.contains(low), f"{requirement}, tested is {pinned}"


def pins(name: str) -> list[Requirement]:
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def installed(pin: Requirement) -> str:
    """Not by importlib's ``version``: Ray puts packages of its own on the path, such as another psutil."""
    (found,) = distributions(name=pin.name, path=[sysconfig.get_path("platlib")])
    return found.version


def test_the_readme_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\bdeploy/[\w./-]+\.(?:yaml|yml|json|sh|txt|example)\b", text):
        assert (ROOT / name).is_file(), name
    tags = set(re.findall(r"vlmflow:(\d\S+?)-(?:cpu|cuda)", text))
    assert tags == {version("vlmflow")}
