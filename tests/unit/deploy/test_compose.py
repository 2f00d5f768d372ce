"""The compose file: against the specification's schema, and against what is asked of every service.

`docker compose` itself cannot run here; check-jsonschema carries the schema that it is specified by.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.server.api.server import create_ui_app
from prefect.settings import PREFECT_UI_STATIC_DIRECTORY, temporary_settings
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from starlette.testclient import TestClient

from pipelines import ray_jobs

DEPLOY = Path(__file__).parents[3] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = {"bucket", "deployments"}  # they end


@pytest.fixture(params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(name: str) -> dict[str, str]:
    found: dict[str, str] = SERVICES[name].get("environment", {})
    return found


def test_it_fits_the_compose_specification() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_all_parts_are_there() -> None:
    assert set(SERVICES) == {
        "ray-head", "ray-worker", "ray-worker-gpu", "prefect-server", "prefect-worker", "deployments", "postgres",
        "store", "bucket", "prometheus", "grafana",
    }  # fmt: skip


def test_images_have_a_tag_that_stays(name: str) -> None:
    image = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", SERVICES[name]["image"])
    repository, tag = image.rsplit(":", 1)
    assert re.search(r"\d+\.\d+", tag), image
    if repository == "vlmflow":
        assert tag.startswith(version("vlmflow"))


def test_no_service_is_root_or_may_become_it(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


def test_ports_are_open_on_loopback_alone(name: str) -> None:
    service = SERVICES[name]
    assert "network_mode" not in service
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:(\$\{\w+:-)?\d+\}?:\d+", port), port


def test_memory_and_cpus_are_limited(name: str) -> None:
    resources = SERVICES[name]["deploy"]["resources"]
    assert resources["limits"].keys() == {"cpus", "memory"}
    assert resources["reservations"].keys() >= {"cpus", "memory"}


def test_the_object_store_of_a_node_fits_into_its_shared_memory() -> None:
    units = {"g": 2**30, "m": 2**20}

    def size(text: str) -> int:
        number, unit = re.findall(r"(\d+)([gm])\}?$", text)[0]
        return int(number) * units[unit]

    for name in ("ray-head", "ray-worker", "ray-worker-gpu"):
        # The share of memory that Ray takes by default. A store that does not fit lies on the disk.
        store = 0.3 * size(SERVICES[name]["deploy"]["resources"]["limits"]["memory"])
        assert store <= size(SERVICES[name]["shm_size"]), name


def test_a_job_that_is_stopped_has_time_to_complete_its_record() -> None:
    wait_s = int(settings("ray-head")["RAY_JOB_STOP_WAIT_TIME_S"])
    assert JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S < wait_s < ray_jobs._STOP_WAIT_S
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in inspect.getsource(JobSupervisor)
    # What is said of the head alone is beside what it shares with the other nodes.
    assert settings("ray-worker").items() < settings("ray-head").items()


def test_a_node_has_time_to_drain_before_it_is_killed() -> None:
    for name in ("ray-head", "ray-worker", "ray-worker-gpu"):
        given_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert given_s >= 2 * RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, name


def test_what_goes_on_running_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    assert ("disable" in service["healthcheck"]) == (name in ONCE)
    if "os.environ['HEALTH_URL']" in str(service["healthcheck"]):
        dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
        # Of our image; services that are no node of Ray name their own.
        assert "HEALTH_URL" in settings(name) or (name.startswith("ray-") and "HEALTH_URL=" in dockerfile)


def test_a_service_waits_for_what_it_needs(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        wanted = "service_completed_successfully" if needed in ONCE else "service_healthy"
        assert how == {"condition": wanted}


def test_secrets_are_files_and_made_by_the_script(name: str) -> None:
    for variable, value in settings(name).items():
        if re.search("PASSWORD|TOKEN|AUTH_STRING|SECRET|ACCESS_KEY", variable):
            assert value == "token" or value.startswith("/run/secrets/"), variable
    used = {str(value).removeprefix("/run/secrets/") for value in settings(name).values() if "/run/secrets/" in value}
    assert used <= set(SERVICES[name].get("secrets", []))
    made = set(re.findall(r"keep ([\w.]+)", (DEPLOY / "secrets.sh").read_text(encoding="utf-8")))
    assert set(SERVICES[name].get("secrets", [])) <= set(COMPOSE["secrets"])
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} == made - {"NAME"}


def test_who_talks_to_ray_has_its_token() -> None:
    with_token = {name for name in SERVICES if "ray_token" in SERVICES[name].get("secrets", [])}
    assert with_token == {"ray-head", "ray-worker", "ray-worker-gpu", "prefect-worker", "deployments", "prometheus"}
    for name in with_token - {"prometheus"}:
        assert settings(name)["RAY_AUTH_MODE"] == "token"
        assert settings(name)["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_every_setting_is_in_the_example_with_its_default() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "env.example").read_text(encoding="utf-8"), re.MULTILINE))
    assert example == defaults


def test_files_that_are_mounted_are_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.rsplit(":", 2)[0] if volume.endswith(":ro") else volume.split(":")[0]
        if source.startswith("./"):
            assert (DEPLOY / source).exists(), source
        elif not source.startswith("$"):
            assert source in COMPOSE["volumes"]


def test_commands_of_the_readme_read_the_job_that_the_flows_read() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    readers = re.findall(r"compose\.yaml exec (\S+) .*--config (deploy/jobs/\S+)", text)
    assert readers
    for service in {"prefect-worker", "deployments", *(service for service, _ in readers)}:
        assert "./jobs:/app/deploy/jobs:ro" in SERVICES[service]["volumes"], service


def test_the_flows_are_deployed_on_the_cluster_of_the_file() -> None:
    command = SERVICES["deployments"]["command"][-1]
    (job_file,) = re.findall(r"job_file=(\S+)", command)
    assert (DEPLOY.parent / Path(job_file).relative_to("/app")).is_file()
    assert "ray_jobs_url=http://ray-head:8265" in command
    (pool,) = set(re.findall(r"--pool (\S+)|work-pool create (\S+)", command)[0]) - {""}
    assert SERVICES["prefect-worker"]["command"][4] == pool
    job = yaml.safe_load((DEPLOY / "jobs" / Path(job_file).name).read_text(encoding="utf-8"))
    assert job["catalog"]["storage"]["endpoint"] == settings("ray-head")["AWS_ENDPOINT_URL"]
    bucket = re.findall(r"-name (\S+)'", SERVICES["bucket"]["entrypoint"][-1])
    assert {job["catalog"]["uri"].split("/")[2], job["source"]["uri"].split("/")[2]} == set(bucket)


def test_a_start_deploys_what_is_absent_and_leaves_what_is_there(tmp_path: Path) -> None:
    """By a `prefect` that notes what it is told, and knows what is there by a file of names."""
    there, told = tmp_path / "there", tmp_path / "told"
    fake = tmp_path / "prefect"
    fake.write_text(f"""#!/bin/sh
for last; do :; done
case "$*" in *inspect*) exec grep -qxF "$last" {there};; esac
echo "$*" >> {told}
""")
    fake.chmod(0o755)

    def start(*names: str) -> list[str]:
        there.write_text("\n".join(names))
        told.write_text("")
        command = [part.replace("$$", "$") for part in SERVICES["deployments"]["command"]]
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(command, env=environment, check=True, timeout=60)
        return re.findall(r"work-pool create \S+|deploy .*?--name \S+", told.read_text())

    deployments = yaml.safe_load((DEPLOY / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    names = [f"{load_flow_from_entrypoint(found['entrypoint']).name}/{found['name']}" for found in deployments]
    assert len(start()) == 4
    assert start("vlmflow", *names) == []
    (deployed,) = start("vlmflow", *names[1:])
    assert deployed.endswith("--name nightly")


def test_prefect_shows_its_pages_to_a_server_that_may_not_write_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(settings("prefect-server")["PREFECT_UI_STATIC_DIRECTORY"])
    assert place.is_relative_to("/tmp"), "which every user may write"
    (tmp_path / "package").touch()
    for name in ("__ui_static_subpath__", "__ui_v2_static_subpath__"):
        monkeypatch.setattr(prefect, name, tmp_path / "package" / "server" / name)  # below a file: for nobody

    def front_page(static_directory: Path | None) -> int:
        with temporary_settings({PREFECT_UI_STATIC_DIRECTORY: static_directory and str(static_directory)}):
            pages = TestClient(create_ui_app(ephemeral=False))
        return pages.get("/", headers={"accept": "text/html"}).status_code

    assert front_page(None) == 404
    assert front_page(tmp_path / place.name) == 200
