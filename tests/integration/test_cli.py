"""The command line as a user meets it: what is printed, the exit code, and that bad input writes nothing."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.flows import HeldImages, held_images
from tests.pictures import write_broken, write_pictures
from tests.processes import started, wait_for
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.checks import Check, doctor, doctor_of
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine.report import installed_versions
from vlmflow.errors import ConfigError


@pytest.fixture
def job_file(make_job: Callable[..., Job], tmp_path: Path) -> Path:
    """A job file with the tiny models and the test policy; source and catalog come from the command line."""
    job = make_job("ignored").model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({name: job[name] for name in ("models", "policy", "max_caption_tokens")}))
    return path


@pytest.fixture
def held() -> Iterator[HeldImages]:
    with held_images(num_free=24) as server:
        yield server


STARTER = ["{catalog}", "--profile", "starter"]
BAD_INPUT = {
    "empty prefix": (["{empty}", *STARTER], ["{empty}", "--allow-empty"]),
    "absent folder": (["{tmp}/none", *STARTER], ["none"]),
    "unknown profile": (["{images}", "{catalog}", "--profile", "huge"], ["huge", "starter"]),
    "no profile": (["{images}", "{catalog}"], ["profile"]),
    "unknown task": (["{images}", *STARTER, "--tasks", "embed,paint"], ["tasks"]),
    "absent policy": (["{images}", *STARTER, "--policy", "none.yaml"], ["none.yaml"]),
    "policy without labels": (["{images}", *STARTER, "--policy", "{nolabels}"], ["categories"]),
    "unknown key": (["{images}", *STARTER, "--config", "{badkey}"], ["colour", "unknown key"]),
    "no yaml": (["{images}", *STARTER, "--config", "{noyaml}"], ["YAML"]),
    "manifest without its column": (["{manifest}", *STARTER], ["uri", "picture"]),
    "absent weights": (
        ["{images}", "{catalog}", "--profile", "base", "--tasks", "caption"],
        ["blip-image-captioning-base"],
    ),
    "absent bucket": (["s3://vlmflow-no-such-bucket/x", *STARTER], ["vlmflow-no-such-bucket"]),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT.values(), ids=list(BAD_INPUT))
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    named: list[str],
    job_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "bucket" in request.node.name:
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server").endpoint)
    monkeypatch.setenv("VLMFLOW_MODELS", str(tmp_path / "weights"))
    write_pictures(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("picture\na.jpg\n")
    (tmp_path / "badkey.yaml").write_text(job_file.read_text() + "colour: red\n")
    (tmp_path / "noyaml.yaml").write_text("a: [")
    (tmp_path / "nolabels.yaml").write_text("name: x\nversion: '1'\nneutral: [a]\ncategories: []\nbindings: []\n")
    places = {
        "tmp": tmp_path,
        "empty": tmp_path / "empty",
        "images": tmp_path / "images",
        "catalog": tmp_path / "catalog",
        "manifest": tmp_path / "list.csv",
        "badkey": tmp_path / "badkey.yaml",
        "noyaml": tmp_path / "noyaml.yaml",
        "nolabels": tmp_path / "nolabels.yaml",
    }
    arguments = [argument.format(**places) for argument in arguments]
    if "--config" not in arguments and "base" not in arguments:
        arguments += ["--config", str(job_file)]
    if "--policy" in arguments and "--config" in arguments:
        arguments += ["--tasks", "embed,moderate"]

    code = run("enrich", *arguments)

    captured = capfd.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("vlmflow:")]
    assert code == 2, captured.err
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err
    for word in named:
        assert word.format(**places) in errors[0]
    assert not (tmp_path / "catalog").exists()


@pytest.mark.usefixtures("ray_session")
def test_plan_enrich_show_export(job_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "images", 6)
    write_broken(tmp_path / "images")
    places = (tmp_path / "images", tmp_path / "catalog", "--profile", "starter", "--config", job_file)

    assert run("plan", *places, "--json") == 0
    planned = json.loads(capfd.readouterr().out)
    assert planned["num_planned"] == 10
    assert not (tmp_path / "catalog").exists()

    assert run("enrich", *places, "--json") == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"stage", "progress", "report"}
    assert events[-1]["statuses"] == {"ok": 6, "unreadable": 4}

    assert run("enrich", *places) == 0
    assert "Nothing due" in capfd.readouterr().out

    assert run("show", tmp_path / "catalog") == 0
    shown = capfd.readouterr().out
    assert "10 images" in shown
    assert "unreadable 4" in shown

    assert run("export", tmp_path / "catalog", tmp_path / "parquet") == 0
    assert run("export", tmp_path / "catalog", tmp_path / "parquet") == 2  # never into a folder that holds something


@pytest.mark.usefixtures("ray_session")
def test_interrupted_it_goes_on_where_it_stopped(
    job_file: Path, held: HeldImages, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of a run: exit 130, what was committed stays, the same command does the rest."""
    num_images = 40
    config = yaml.safe_load(job_file.read_text()) | {"commit": {"max_rows": 8}, "tasks": ["embed"]}
    config["pools"] = [{"tasks": ["embed"], "cpus": 0.5, "batch_size": 4}]
    config["source"] = {"http": {"allow_private_addresses": True, "timeout_s": 250}}
    job_file.write_text(yaml.safe_dump(config))
    manifest = held.manifest(tmp_path / "images.csv", num_images)
    command = ["enrich", manifest, tmp_path / "catalog", "--profile", "starter", "--config", job_file, "--json"]
    commits = tmp_path / "catalog" / "images" / "_delta_log"
    log = tmp_path / "log"
    with started([sys.executable, "-m", "vlmflow", *map(str, command)], log) as process:
        wait_for(lambda: len(list(commits.glob("*.json"))) > 1, process)  # the first makes the table
        process.send_signal(signal.SIGINT)
        process.wait(300)
    errors = log.read_text()
    assert process.returncode == 130, errors
    assert "Run the same command again" in errors
    config_ = CatalogConfig(uri=str(tmp_path / "catalog"))
    committed = Catalog.open(config_).images(["image_id"]).num_rows
    assert 0 < committed <= held.num_free

    held.released.set()
    assert run(*command) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["num_added"] == num_images - committed
    rows = Catalog.open(config_).images(["image_id"])
    assert rows.num_rows == len(rows["image_id"].unique()) == num_images


@pytest.mark.slow
def test_two_runs_at_once_commit_each_image_once(job_file: Path, tmp_path: Path) -> None:
    """Both plan all images; whoever commits an image first keeps it, and the other says so."""
    write_pictures(tmp_path / "images", 300)
    config = yaml.safe_load(job_file.read_text()) | {"commit": {"max_rows": 20}, "tasks": ["embed"]}
    config["ray"] = {"num_cpus": 2, "object_store_bytes": 100 * 1024 * 1024}
    job_file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "vlmflow", "enrich", str(tmp_path / "images"), str(tmp_path / "catalog")]
    command += ["--profile", "starter", "--config", str(job_file), "--json"]
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    with started(command, logs[0]) as one, started(command, logs[1]) as other:
        assert [process.wait(600) for process in (one, other)] == [0, 0]
    reports = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    rows = Catalog.open(CatalogConfig(uri=str(tmp_path / "catalog"))).images(["image_id"])
    assert rows.num_rows == len(rows["image_id"].unique()) == 300
    assert sum(report["num_added"] for report in reports) == 300
    assert all(report["num_added"] + report["num_by_others"] == report["num_due"] for report in reports)


def test_help_names_every_command_and_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capfd.readouterr().out
    for command in ("enrich", "plan", "show", "export", "profiles", "doctor", "demo"):
        assert command in shown


def test_the_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capfd.readouterr().out == f"vlmflow {installed_versions()['vlmflow']}\n"


def test_profiles_say_what_each_is_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("profiles", "--json") == 0
    described = {profile["name"]: profile for profile in json.loads(capfd.readouterr().out)}
    assert set(described) >= {"starter", "base", "large"}
    assert "NOT for photographs" in described["starter"]["purpose"]


@pytest.mark.parametrize(
    ("arguments", "module", "function"),
    [
        (["serve", "{catalog}"], "vlmflow.web.server", "serve"),
        (["search", "{catalog}", "a bag"], "vlmflow.search.searcher", "search_images"),
        (["search", "{catalog}", "--build-index"], "vlmflow.search.build", "update_index"),
        (["explain", "{catalog}", "a.jpg"], "vlmflow.explain", "find_evidence"),
    ],
)
@pytest.mark.parametrize(
    ("given", "used"), [([], "http://store:1"), (["--endpoint", "http://other:2"], "http://other:2")]
)
def test_a_job_s_storage_is_used_unless_the_command_line_names_another(
    arguments: list[str], module: str, function: str, given: list[str], used: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = tmp_path / "job.yaml"
    job.write_text("source: {uri: x}\nprofile: starter\ncatalog: {uri: x, storage: {endpoint: 'http://store:1'}}\n")
    opened: list[CatalogConfig] = []

    def refuse(place: CatalogConfig, *_: object, **__: object) -> None:
        opened.append(place)
        raise ConfigError("opened")

    monkeypatch.setattr(importlib.import_module(module), function, refuse)
    assert run(*(part.format(catalog="s3://b/catalog") for part in arguments), "--config", job, *given) == 2
    assert [(place.uri, place.storage.endpoint) for place in opened] == [("s3://b/catalog", used)]


def test_doctor_of_a_job_takes_another_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text("source: {uri: s3://a/b}\ncatalog: {uri: s3://a/c}\nprofile: starter\n")
    looked_at: list[Job] = []

    def look_at(job: Job) -> list[Check]:
        looked_at.append(job)
        return []

    monkeypatch.setattr(sys.modules[doctor.__module__], "doctor_of", look_at)
    assert run("doctor", "--config", tmp_path / "job.yaml", "--endpoint", "http://other:2") == 0
    (job,) = looked_at
    assert {part.storage.endpoint for part in (job.source, job.catalog)} == {"http://other:2"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify", "{tmp}", "{tmp}", "--policy", "demo"], "only together with a profile"),
        (["verify", "{tmp}", "{tmp}", "--tasks", "embed"], "only together with a profile"),
        (["remoderate", "{tmp}", "--config", "{tmp}/job.yaml", "--policy", "demo", "--rollback", "abc"],
         "remoderate was given --policy demo and --rollback abc"),
    ],
)  # fmt: skip
def test_options_that_would_be_dropped_are_refused(
    arguments: list[str], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(*(part.format(tmp=tmp_path) for part in arguments)) == 2
    assert named in capfd.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_doctor_checks_storage_with_conditional_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("doctor", "--catalog", tmp_path / "catalog", "--json")
    checks = {check["name"]: check for check in map(json.loads, capfd.readouterr().out.splitlines())}
    assert checks["conditional writes"]["verdict"] == "ok"
    assert checks["ray workers"]["verdict"] == "ok"
    assert not list((tmp_path / "catalog").glob(".doctor*"))


@pytest.mark.usefixtures("ray_session")
def test_doctor_asks_every_node_and_takes_builds_for_other_devices_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    here = installed_versions()
    module = sys.modules[doctor.__module__]
    monkeypatch.setattr(module, "installed_versions", lambda: here | {"torch": f"{here['torch']}+cpu"})
    *_, check = doctor()
    assert (check.verdict, check.found) == ("ok", "start on 1 node(s), and import vlmflow in the driver's versions")
    monkeypatch.setattr(module, "installed_versions", lambda: {n: v for n, v in here.items() if n != "pillow-heif"})
    *_, check = doctor()
    assert check.verdict == "fail"
    assert f"pillow-heif none here, {here['pillow-heif']} there" in check.found
    monkeypatch.setattr(module, "installed_versions", lambda: here | {"torch": "1.13.0"})
    nodes = ray.nodes()
    ghost = nodes[0] | {"NodeID": "a" * 56, "NodeManagerAddress": "10.9.8.7"}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, ghost, ghost | {"NodeID": "b" * 56, "Alive": False}])
    *_, check = doctor()
    assert check.verdict == "fail"
    assert f"torch 1.13.0 here, {here['torch'].partition('+')[0]} there" in check.found
    assert "10.9.8.7: " in check.found


OWN = """
from vlmflow.families import Family


class Captioner:
    family = Family(("caption",), code_version={version})
    load = caption = print
"""


@pytest.mark.usefixtures("ray_session")
def test_doctor_of_a_job_asks_every_node_for_modules_of_one_s_own(
    make_job: Callable[..., Job], real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers find no module in a folder that the driver alone looks in."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shop_of_the_driver.py").write_text(OWN.format(version=3))
    job = make_job(tmp_path, **real)
    own = job.models["caption"].model_copy(update={"family": "shop_of_the_driver:Captioner"})
    *_, check = doctor_of(job.model_copy(update={"models": job.models | {"caption": own}}))
    there = "there is no module shop_of_the_driver there"
    assert check.verdict == "fail"
    assert f": family shop_of_the_driver:Captioner: code version 3 here, {there}" in check.found
    assert "modules of your own" in check.remedy
    nowhere = own.model_copy(update={"family": "shop_of_nobody:Captioner"})
    first, *_, check = doctor_of(job.model_copy(update={"models": job.models | {"caption": nowhere}}))
    assert first.found == "family shop_of_nobody:Captioner: there is no module shop_of_nobody"
    assert (check.verdict, check.found.partition("versions")[2]) == (
        "ok",
        ", shop_of_nobody:Captioner as the driver does",
    )
