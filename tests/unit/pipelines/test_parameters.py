"""The parameters of the flows as Prefect's form and as command-line options."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from prefect import Flow
from prefect.settings import Settings
from prefect.states import Completed, Failed

import pipelines
from pipelines import command_line
from pipelines.adhoc import adhoc_job
from pipelines.backfill import moderation_backfill
from pipelines.nightly import nightly_enrichment
from vlmflow.config import TaskName
from vlmflow.errors import ConfigError, RegressionError

FLOWS = {"nightly": nightly_enrichment, "backfill": moderation_backfill, "adhoc": adhoc_job}
KINDS = {"string", "integer", "number", "boolean", "array"}


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow[..., Any]:
    return FLOWS[request.param]


def fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every parameter with what is said of it, and the branch of its type that is not null."""
    for name, about in schema["properties"].items():
        branches = [part for part in about.get("anyOf", [about]) if part.get("type") != "null"]
        yield name, about, branches[0]


def test_prefect_reports_nothing_to_its_makers_unless_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    importlib.reload(pipelines)
    assert not Settings().server.analytics_enabled
    assert os.environ["DO_NOT_TRACK"] == "1"
    for name, value in zip(names, ("true", "0"), strict=True):
        monkeypatch.setenv(name, value)
    importlib.reload(pipelines)
    assert Settings().server.analytics_enabled
    assert os.environ["DO_NOT_TRACK"] == "0"


def test_every_parameter_is_described_and_typed(flow: Flow[..., Any]) -> None:
    schema = flow.parameters.model_dump()
    for name, about, branch in fields(schema):
        assert about["description"].endswith("."), name
        assert branch.get("type") in KINDS or branch.get("$ref") == "#/definitions/Golden", name
    assert schema["required"] == (["job_file", "ray_jobs_url"] if flow.name == "adhoc-job" else ["job_file"])
    for name in ("date", "start", "end"):
        if name in schema["properties"]:
            assert schema["properties"][name]["anyOf"][0]["format"] == "date"


def test_the_golden_set_has_a_form_of_its_own() -> None:
    definition = nightly_enrichment.parameters.model_dump()["definitions"]["Golden"]
    assert definition["required"] == ["uri", "accepted"]
    assert all(about["description"] for about in definition["properties"].values())


def test_tasks_are_chosen_from_a_list() -> None:
    schema = adhoc_job.parameters.model_dump()["properties"]["tasks"]["anyOf"][0]
    assert schema["items"]["enum"] == list(get_args(TaskName))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("nightly", {"job_file": "job.yaml", "deadline_hours": 0}),
        ("nightly", {"job_file": "job.yaml", "keep_reports": 0}),
        ("nightly", {"job_file": "job.yaml", "max_flagged_jump": 1.5}),
        ("nightly", {"job_file": "job.yaml", "date": "yesterday"}),
        ("nightly", {"job_file": "job.yaml", "golden": {"uri": "golden/"}}),
        ("nightly", {}),
        ("backfill", {"job_file": "job.yaml", "partitions_at_once": 17}),
        ("adhoc", {"job_file": "job.yaml", "ray_jobs_url": "http://h", "tasks": ["paint"]}),
        ("adhoc", {"job_file": "job.yaml", "ray_jobs_url": "http://h", "limit": 0}),
        ("adhoc", {"job_file": "job.yaml"}),
    ],
)
def test_a_value_that_does_not_fit_starts_nothing(
    name: str, given: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flow, "__call__", lambda *_, **__: pytest.fail("it was run"))
    arguments = []
    for parameter, value in given.items():
        text = json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, list) else value
        arguments += [f"--{parameter.replace('_', '-')}", str(text)]
    with pytest.raises(SystemExit) as left:
        command_line.main(FLOWS[name], arguments)
    assert left.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    missing = sorted(flow_requires(name) - given.keys())
    assert (missing[0].replace("_", "-") if missing else list(given)[-1]) in last
    assert "Traceback" not in last


def flow_requires(name: str) -> set[str]:
    return set(FLOWS[name].parameters.model_dump()["required"])


def test_help_names_every_option_and_its_meaning(flow: Flow[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(flow, ["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, about, _ in fields(flow.parameters.model_dump()):
        assert f"--{name.replace('_', '-')}" in shown
        assert " ".join(about["description"].split()[:3]) in shown
        if about.get("type") in ("integer", "number"):
            assert f"Default: {about['default']:g}." in shown
    assert "Args:" not in shown
    assert f"python -m pipelines.{flow.fn.__module__.rpartition('.')[2]}" in shown


def ended_with(monkeypatch: pytest.MonkeyPatch, state: Any) -> dict[str, Any]:
    """What the flow is called with; it ends in ``state``."""
    given: dict[str, Any] = {}

    def call(self: Flow[..., Any], **parameters: Any) -> Any:
        from prefect.context import TagsContext

        given.update(parameters, tags=set(TagsContext.get().current_tags))
        return state

    monkeypatch.setattr(Flow, "__call__", call)
    monkeypatch.setattr(command_line, "_start_server", lambda: None)
    return given


def test_options_become_parameters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ended_with(monkeypatch, Completed(message="2 rows new."))
    arguments = ["--job-file", "j.yaml", "--ray-jobs-url", "http://h:1", "--tasks", "embed, moderate", "--limit", "5"]
    command_line.main(adhoc_job, arguments)
    assert str(given["job_file"]) == "j.yaml"
    assert (given["tasks"], given["limit"], given["tags"]) == (["embed", "moderate"], 5, {"vlmflow", "adhoc"})
    assert capsys.readouterr().out == "adhoc-job: 2 rows new.\n"
    command_line.main(moderation_backfill, ["--job-file", "j.yaml", "--dry-run", "--start", "2026-11-01"])
    assert (given["dry_run"], str(given["start"])) == (True, "2026-11-01")
    golden = {"uri": "golden/", "accepted": "accepted.json", "limits": {"max_margin_shift": 0.1}}
    command_line.main(nightly_enrichment, ["--job-file", "j.yaml", "--golden", json.dumps(golden)])
    assert given["golden"].limits.max_margin_shift == 0.1


@pytest.mark.parametrize(
    ("state", "code", "line"),
    [
        (Failed(data=RegressionError("worse", remedy="Look.")), 1, "worse - Look."),
        (Failed(data=ConfigError("no such\nfile")), 2, "no such file"),
        (Failed(data=TimeoutError(), name="TimedOut", message="Flow run exceeded timeout of 3 second(s)"), 1,
         "Flow run exceeded timeout of 3 second(s)"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Any, code: int, line: str
) -> None:
    ended_with(monkeypatch, state)
    with pytest.raises(SystemExit) as left:
        command_line.main(nightly_enrichment, ["--job-file", "job.yaml"])
    assert left.value.code == code
    assert capsys.readouterr().err == f"nightly-enrichment: {line}\n"


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (KeyboardInterrupt(), 130, "the same command follows it again"),
        (RuntimeError("Failed to reach API at http://127.0.0.1:9/api/"), 2, "Prefect: Failed to reach API"),
    ],
)
def test_what_ends_it_from_outside_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    part: str,
) -> None:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(Flow, "__call__", call)
    monkeypatch.setattr(command_line, "_start_server", lambda: None)
    monkeypatch.setattr(command_line, "end_within", lambda *_: None)  # it would end the tests
    with pytest.raises(SystemExit) as left:
        command_line.main(nightly_enrichment, ["--job-file", "job.yaml"])
    assert left.value.code == code
    assert part in capsys.readouterr().err
