"""The Kubernetes manifests: against the published schemas, and against what a platform team asks of every pod.

No package carries the schemas of KubeRay and of the Prometheus operator: what is theirs is checked by the asserts
here, and its pod templates against the schema of pods.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

from pipelines import ray_jobs
from vlmflow.config import load_job

DEPLOY = Path(__file__).parents[3] / "deploy"
VERSION = "1.37"  # of the schemas
_CUSTOM = {"RayCluster", "RayJob", "PodMonitor"}
_TOKEN = re.compile(r"[A-Za-z0-9+/_-]{24,}")


def manifests() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [found for path in files for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def one(kind: str) -> dict[str, Any]:
    (found,) = (item for item in manifests() if item["kind"] == kind)
    return found


@functools.cache
def flow_run_pod() -> dict[str, Any]:
    """The pod of a flow run, as Prefect's worker makes it from the template of the work pool."""
    template = json.loads((DEPLOY / "kubernetes/work-pool.json").read_text(encoding="utf-8"))
    defaults = {name: about.get("default") for name, about in template["variables"]["properties"].items()}
    given = {name: value for name, value in defaults.items() if value is not None}
    configuration = KubernetesWorkerJobConfiguration(**apply_values(template["job_configuration"], given))
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="nightly"))
    pod: dict[str, Any] = configuration.job_manifest["spec"]["template"]
    for name in ("completions", "parallelism"):
        # Prefect insists on them where Kubernetes knows no such fields, and drops them.
        assert pod["spec"].pop(name) == 1
    kubernetes_validate.validate(configuration.job_manifest, VERSION, strict=True)
    return pod


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, by a name that tells where it stands."""
    spec = one("RayCluster")["spec"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    yield "submitter", one("RayJob")["spec"]["submitterPodTemplate"]
    yield "prefect-worker", one("Deployment")["spec"]["template"]
    yield "flow-run", flow_run_pod()


@pytest.fixture(autouse=True, scope="module")
def schemas_read_once() -> Iterator[None]:
    """The package reads megabytes of definitions for every manifest."""
    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(kubernetes_validate.utils.schema_contents)
        patch.setattr(kubernetes_validate.utils, "schema_contents", read)
        yield


POD_NAMES = ["head", "cpu", "gpu", "submitter", "prefect-worker", "flow-run"]


@pytest.fixture(params=POD_NAMES)
def pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(pods())[request.param]


def test_all_pods_are_looked_at() -> None:
    assert [name for name, _ in pods()] == POD_NAMES


@pytest.mark.parametrize("manifest", manifests(), ids=lambda item: f"{item['kind']}")
def test_a_manifest_fits_its_schema(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in _CUSTOM:
        assert manifest["apiVersion"] in {"ray.io/v1", "monitoring.coreos.com/v1"}
        return
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_a_pod_template_fits_the_schema_of_pods(pod: dict[str, Any]) -> None:
    wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **pod.get("metadata", {})}}
    kubernetes_validate.validate(wrapped | {"spec": pod["spec"]}, VERSION, strict=True)


def test_a_field_that_does_not_exist_would_be_found(pod: dict[str, Any]) -> None:
    wrong = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod["spec"] | {"securityContex": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_no_pod_runs_as_root_or_may_become_it(pod: dict[str, Any]) -> None:
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["spec"]["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_every_container_asks_for_what_it_needs(pod: dict[str, Any]) -> None:
    for container in pod["spec"]["containers"]:
        resources = container["resources"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        assert resources["limits"].keys() >= {"cpu", "memory"}
        # Ray counts on the memory that it was promised.
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_a_job_that_is_stopped_has_time_to_complete_its_record() -> None:
    (head,) = dict(pods())["head"]["spec"]["containers"]
    wait_s = {variable["name"]: variable.get("value") for variable in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert 30 <= int(wait_s) < ray_jobs._STOP_WAIT_S


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_a_node_has_time_to_drain_before_it_is_killed(name: str) -> None:
    given_s = dict(pods())[name]["spec"]["terminationGracePeriodSeconds"]
    assert given_s >= 2 * RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_the_object_store_of_a_node_fits_into_its_shared_memory(name: str) -> None:
    spec = dict(pods())[name]["spec"]
    (shm,) = (volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "shm")
    memory = spec["containers"][0]["resources"]["limits"]["memory"]
    # The share of memory that Ray takes by default. A store that does not fit lies on the disk.
    assert 0.3 * int(memory.removesuffix("Gi")) <= int(shm.removesuffix("Gi"))


@pytest.mark.parametrize("name", ["head", "cpu", "gpu", "prefect-worker"])
def test_what_goes_on_running_has_probes(name: str) -> None:
    for container in dict(pods())[name]["spec"]["containers"]:
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in {"/api/healthz", "/health"}
            assert container[probe]["httpGet"]["port"] in {52365, "health"}


def test_only_those_who_talk_to_kubernetes_hold_a_token_of_it() -> None:
    mounted = {
        name: pod["spec"].get("automountServiceAccountToken", True)
        for name, pod in pods()
        if pod["spec"].get("automountServiceAccountToken", True)
    }
    assert mounted == {"head": True, "prefect-worker": True}
    rules = one("Role")["rules"]
    assert not any("*" in rule["verbs"] + rule["resources"] + rule["apiGroups"] for rule in rules)
    assert not any("secrets" in rule["resources"] for rule in rules)


def test_secrets_are_references() -> None:
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env") or []:
                if re.search("KEY|TOKEN|AUTH_STRING|PASSWORD", variable["name"]) and "value" in variable:
                    # The names of a secret and of its key.
                    assert variable["name"].endswith(("_SECRET_NAME", "_SECRET_KEY")), (name, variable)
    assert not any(item["kind"] == "Secret" for item in manifests())
    for path in (DEPLOY / "kubernetes").iterdir():
        for word in _TOKEN.findall(path.read_text(encoding="utf-8")):
            assert not re.fullmatch("[0-9a-f]+", word), (path.name, word)
            assert not _is_key(word), (path.name, word)


def _is_key(word: str) -> bool:
    """Whether a long word looks like random bytes in base64: names have no capitals beside digits."""
    has_all = all(re.search(pattern, word) for pattern in ("[a-z]", "[A-Z]", "[0-9]"))
    return has_all and len(base64.b64decode(word + "=" * (-len(word) % 4), altchars="-_")) >= 18


def test_the_cluster_grows_by_gpus_only_when_they_are_asked_for() -> None:
    spec = one("RayCluster")["spec"]
    assert spec["rayVersion"] == version("ray")
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    cpu, gpu = spec["workerGroupSpecs"]
    assert (cpu["minReplicas"], gpu["minReplicas"]) == (1, 0)
    for group in (cpu, gpu):
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        # Ray's own argument parser takes strings; KubeRay refuses numbers.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_job_for_it_asks_for_no_more_gpus_than_it_may_have() -> None:
    job = load_job(DEPLOY / "jobs/large-cluster.yaml", {})
    gpu = one("RayCluster")["spec"]["workerGroupSpecs"][1]
    assert sum(pool.gpus * pool.max_actors for pool in job.pools) <= gpu["maxReplicas"]


def test_the_work_pool_takes_the_template_of_the_checkout(tmp_path: Path) -> None:
    """By a `kubectl` that does here what is to be done in the pod, and a `prefect` that keeps the template."""
    fakes = {
        "kubectl": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "prefect": f'while [ "$1" != --base-job-template ]; do shift; done; cat "$2" > {tmp_path}/kept',
    }
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"kubectl -n vlmflow exec -i deploy/prefect-worker.*?(?=\n *kubectl)", text, re.DOTALL)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    edited = (DEPLOY / "kubernetes/work-pool.json").read_text(encoding="utf-8") + " "  # no image has this one
    place = tmp_path / "deploy/kubernetes/work-pool.json"
    place.parent.mkdir(parents=True)
    place.write_text(edited, encoding="utf-8")
    commands = commands.replace("/tmp/", f"{tmp_path}/")
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "kept").read_text(encoding="utf-8") == edited


def test_an_adhoc_job_runs_on_the_cluster_that_is_there() -> None:
    job, cluster = one("RayJob")["spec"], one("RayCluster")
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    # What KubeRay refuses beside a cluster selector.
    assert job["backoffLimit"] == 0
    assert job["shutdownAfterJobFinishes"] is False
    mounts = {mount["mountPath"] for mount in dict(pods())["head"]["spec"]["containers"][0]["volumeMounts"]}
    (config,) = re.findall(r"--config (\S+)", job["entrypoint"])
    assert str(Path(config).parent) in mounts
    assert (DEPLOY / "jobs" / Path(config).name).is_file()


def test_an_ad_hoc_run_has_an_end_that_stops_it() -> None:
    job = one("RayJob")["spec"]
    # At which KubeRay gives the RayJob up, and does not stop the run.
    assert "activeDeadlineSeconds" not in job
    # One signal, to the run alone: a second one would fall into its tidying up.
    assert job["entrypoint"].startswith("timeout --foreground --signal=TERM ")


def test_prometheus_finds_a_port_on_every_ray_pod() -> None:
    monitor = one("PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert monitor["selector"]["matchLabels"] == {"ray.io/cluster": one("RayCluster")["metadata"]["name"]}
    spec = one("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert str(ports[endpoint["port"]]) == group["rayStartParams"]["metrics-export-port"]


def test_the_kustomization_holds_what_is_there() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text(encoding="utf-8"))
    named = set(kustomization["resources"])
    assert all((DEPLOY / name).is_file() for name in named)
    # Ad-hoc jobs are created by hand.
    there = {f"kubernetes/{path.name}" for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert there - named == {"kubernetes/rayjob.yaml"}
    images = {image["name"]: image["newTag"] for image in kustomization["images"]}
    used = {container["image"] for _, pod in pods() for container in pod["spec"]["containers"]}
    assert set(images) <= used
    assert all(tag.startswith(version("vlmflow")) for tag in images.values())
    made = {made["name"]: made for made in kustomization["configMapGenerator"]}
    assert all((DEPLOY / name).is_file() for item in made.values() for name in item.get("files", []))
    for text in (path.read_text(encoding="utf-8") for path in (DEPLOY / "kubernetes").iterdir()):
        assert set(re.findall(r"vlmflow-(?:jobs|environment|dashboard)", text)) <= set(made)
