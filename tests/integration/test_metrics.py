"""What a run tells is what the node's metrics endpoint serves, where Prometheus reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import ray

from tests.pictures import write_broken, write_pictures
from tests.processes import wait_for
from vlmflow.config import Job
from vlmflow.engine import enrich
from vlmflow.engine.metrics import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = pytest.mark.usefixtures("ray_session")

_SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape() -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample that the nodes of the cluster serve."""
    samples = []
    for node in ray.nodes():
        if node["Alive"]:
            page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30)
            found = (_SAMPLE.match(line) for line in page.text.splitlines())
            samples += [(match[1], dict(_LABEL.findall(match[2])), float(match[3])) for match in found if match]
    return samples


def test_a_run_is_seen_on_the_nodes_metrics_endpoint(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 8)
    broken = write_broken(tmp_path / "images")
    job = make_job(tmp_path / "images", tasks=("embed", "moderate"))

    report = enrich(job)

    def of_run(name: str, label: str) -> dict[str, float]:
        return {
            labels[label]: value
            for found, labels, value in scrape()
            if found == f"ray_{name}" and labels.get("catalog") == report.catalog
        }

    # Ray collects from its processes every ten seconds.
    wait_for(lambda: bool(of_run("vlmflow_images_total", "status")), seconds=60)
    assert of_run("vlmflow_images_total", "status") == report.statuses
    assert of_run("vlmflow_decisions_total", "decision") == report.decisions
    assert of_run("vlmflow_errors_total", "error_class") == report.errors
    assert of_run("vlmflow_read_bytes_total", "catalog") == {report.catalog: report.bytes_read}
    images = of_run("vlmflow_stage_images_total", "stage")
    assert images == {stage.stage: stage.images for stage in report.stages}
    assert images["embed"] == 8
    assert images["read"] == 8 + len(broken)
    busy = of_run("vlmflow_stage_busy_seconds_total", "stage")
    assert busy == {stage.stage: pytest.approx(stage.busy_s, abs=1e-3) for stage in report.stages}
    assert of_run("vlmflow_queue_images", "waiting_for") == {"workers": 0, "commit": 0}  # it is over
    assert of_run("vlmflow_queue_blocks", "catalog") == {report.catalog: 0}

    of_pool = {name: value for name, labels, value in scrape() if labels.get("pool") == "embed+moderate"}
    assert of_pool["ray_vlmflow_batch_images_sum"] >= 8 + len(broken)
    assert of_pool["ray_vlmflow_pool_busy_seconds_total"] > 0
    assert "ray_vlmflow_pool_waiting_seconds_total" in of_pool or of_pool["ray_vlmflow_batch_images_count"] == 1


def test_ray_serves_what_the_dashboard_asks_it_for() -> None:
    dashboard = (Path(__file__).parents[2] / "deploy/grafana/vlmflow.json").read_text(encoding="utf-8")
    of_ray = set(re.findall(r"\bray_(?!vlmflow_)\w+", dashboard))
    of_gpus = {"ray_node_gpus_utilization", "ray_node_gram_used"}

    wait_for(lambda: of_ray - of_gpus <= {name for name, _, _ in scrape()}, seconds=60)

    assert of_gpus < of_ray


def test_every_metric_that_a_run_tells_is_described() -> None:
    described = COUNTERS | GAUGES | HISTOGRAMS
    served = {name for name, _, _ in scrape() if name.startswith("ray_vlmflow_")}

    assert {re.sub(r"_(bucket|sum|count)$", "", name).removeprefix("ray_") for name in served} <= set(described)
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES | HISTOGRAMS)
