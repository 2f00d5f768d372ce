"""What a run tells is what the node's metrics endpoint serves, where Prometheus reads it."""

from __future__ import annotations

import re
from collections import Counter
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
from vlmflow.engine.report import RunReport

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_IMAGES = 8
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


def of_pool(name: str) -> Counter[tuple[str, ...]]:
    """By actor, those of other runs included: what each served last stays for some minutes after its end."""
    return Counter(
        {
            tuple(sorted(labels.values())): value
            for found, labels, value in scrape()
            if (found, labels.get("pool")) == (f"ray_vlmflow_{name}", "embed+moderate")
        }
    )


@pytest.fixture(scope="module")
def report(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """Of a run that is seen whole: Ray collects from each of its processes every ten seconds, one after the other."""
    folder = tmp_path_factory.mktemp("run")
    write_pictures(folder / "images", NUM_IMAGES)
    num_rows = NUM_IMAGES + len(write_broken(folder / "images"))
    before = of_pool("batch_images_sum")
    report = enrich(make_job_in(folder, folder / "images", tasks=("embed", "moderate")))
    wait_for(lambda: bool(of_run(report, "vlmflow_images_total", "status")))
    wait_for(lambda: (of_pool("batch_images_sum") - before).total() >= num_rows)
    return report


def of_run(report: RunReport, name: str, label: str) -> dict[str, float]:
    return {
        labels[label]: value
        for found, labels, value in scrape()
        if found == f"ray_{name}" and labels.get("catalog") == report.catalog
    }


@pytest.mark.slow
def test_a_run_is_seen_on_the_nodes_metrics_endpoint(report: RunReport) -> None:
    assert of_run(report, "vlmflow_images_total", "status") == report.statuses
    assert of_run(report, "vlmflow_decisions_total", "decision") == report.decisions
    assert of_run(report, "vlmflow_errors_total", "error_class") == report.errors
    assert of_run(report, "vlmflow_read_bytes_total", "catalog") == {report.catalog: report.bytes_read}
    images = of_run(report, "vlmflow_stage_images_total", "stage")
    assert images == {stage.stage: stage.images for stage in report.stages}
    assert images["embed"] == NUM_IMAGES
    assert images["read"] == sum(report.statuses.values()) > NUM_IMAGES
    busy = of_run(report, "vlmflow_stage_busy_seconds_total", "stage")
    assert busy == {stage.stage: pytest.approx(stage.busy_s, abs=1e-3) for stage in report.stages}
    assert of_run(report, "vlmflow_queue_images", "waiting_for") == {"workers": 0, "commit": 0}  # it is over
    assert of_run(report, "vlmflow_queue_blocks", "catalog") == {report.catalog: 0}

    assert any(of_pool("pool_busy_seconds_total").values())
    assert of_pool("pool_waiting_seconds_total") or set(of_pool("batch_images_count").values()) == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_ray_serves_what_the_dashboard_asks_it_for() -> None:
    dashboard = (Path(__file__).parents[2] / "deploy/grafana/vlmflow.json").read_text(encoding="utf-8")
    of_ray = set(re.findall(r"\bray_(?!vlmflow_)\w+", dashboard))
    of_gpus = {"ray_node_gpus_utilization", "ray_node_gram_used"}

    wait_for(lambda: of_ray - of_gpus <= {name for name, _, _ in scrape()})

    assert of_gpus < of_ray


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_every_metric_that_a_run_tells_is_described() -> None:
    described = COUNTERS | GAUGES | HISTOGRAMS
    served = {name for name, _, _ in scrape() if name.startswith("ray_vlmflow_")}

    assert {"ray_vlmflow_images_total", "ray_vlmflow_batch_images_sum"} <= served
    assert {re.sub(r"_(bucket|sum|count)$", "", name).removeprefix("ray_") for name in served} <= set(described)
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES | HISTOGRAMS)
