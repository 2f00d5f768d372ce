"""Prometheus and Grafana: panels ask for metrics that vlmflow or Ray tells, in words that Prometheus understands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard
import yaml

from vlmflow.engine.metrics import COUNTERS, GAUGES, HISTOGRAMS

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/vlmflow.json").read_text(encoding="utf-8"))
_METRIC = re.compile(r"\bray_\w+")

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def asked() -> set[str]:
    return {metric for _, query in queries() for metric in _METRIC.findall(query)}


def test_every_panel_asks_for_metrics_that_exist() -> None:
    ours = {f"ray_{name}" for name in COUNTERS | GAUGES}
    ours |= {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    of_ray = asked() - ours
    assert not any(name.startswith("ray_vlmflow") for name in of_ray)
    # Ray's own dashboards and its node agent name what Ray tells.
    folder = Path(ray.dashboard.__file__).parent / "modules"
    sources = [*(folder / "metrics/dashboards").glob("*.py"), folder / "reporter/reporter_agent.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in of_ray:
        assert re.search(rf"\b{name}\b", text) or f'"{name.removeprefix("ray_")}"' in text, name


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked()}
    assert {f"ray_{name}" for name in COUNTERS | GAUGES | HISTOGRAMS} <= shown
    assert {"ray_node_gpus_utilization", "ray_node_gram_used"} <= shown


def test_labels_that_queries_name_are_those_of_the_metric() -> None:
    for title, query in queries():
        for name, (_, labels) in (COUNTERS | GAUGES | HISTOGRAMS).items():
            for selected in re.findall(rf"ray_{name}(?:_bucket|_count|_sum)?\{{([^}}]*)\}}", query):
                assert set(re.findall(r"(\w+)\s*=", selected)) <= set(labels), (title, name)
            if f"ray_{name}" in query and (grouped := re.search(r"sum by \(([^)]*)\)", query)):
                assert set(re.split(r",\s*", grouped[1])) - {"le"} <= set(labels), (title, name)


def test_panels_lie_side_by_side_and_say_what_they_show() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
    assert all(panel["description"] and panel["targets"] for panel in panels())
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_grafana_finds_the_data_source_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text(encoding="utf-8"))["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    mounted = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert f"{provider['options']['path']}/vlmflow.json" in mounted
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted


def test_prometheus_asks_ray_for_its_nodes() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    (found,) = (job["http_sd_configs"][0] for job in config["scrape_configs"] if job["job_name"] == "ray")
    assert found["url"] == "http://ray-head:8265/api/prometheus/sd"
    assert found["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/ray_token"}
    assert "ray_token" in services["prometheus"]["secrets"]
    head = Path(ray.dashboard.__file__).parent / "modules/reporter/reporter_head.py"
    assert "/api/prometheus/sd" in head.read_text(encoding="utf-8")


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus/prometheus.yml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def rules(folder: Path) -> Path:
    """Every query as a rule, with Grafana's variables filled in; rules are named after panel and target."""
    made = []
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "6h").replace("$catalog", ".*")
            made.append({"record": f"panel:{panel['id']}_{target['refId']}", "expr": query})
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}), encoding="utf-8")
    return path


@needs_promtool
def test_promtool_understands_every_query(tmp_path: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(rules(tmp_path))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    selected = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{selected}}}", "values": values}


def check_rules(folder: Path, test: dict[str, Any]) -> None:
    (folder / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


@needs_promtool
def test_totals_count_runs_that_committed_once_and_workers_that_are_gone(tmp_path: Path) -> None:
    rules(tmp_path)
    images, decisions = "ray_vlmflow_images_total", "ray_vlmflow_decisions_total"
    ids = {panel["title"]: panel["id"] for panel in panels()}
    rows, flagged = (f"panel:{ids[title]}_A" for title in ("Rows committed, by status", "Flagged"))
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    series(images, "100x600", catalog="c", status="ok", WorkerId="of an earlier run"),
                    series(images, "_x300 40 70 70x290", catalog="c", status="ok", WorkerId="of this run"),
                    series(images, "_x400 5 5 _x200", catalog="c", status="failed", WorkerId="of a node that is gone"),
                    series(decisions, "_x300 30 30x290", catalog="c", decision="allow", WorkerId="of this run"),
                    series(decisions, "_x300 10 10x290", catalog="c", decision="review", WorkerId="of this run"),
                ],
                "promql_expr_test": [
                    {
                        "expr": rows,
                        "eval_time": "500m",
                        "exp_samples": [
                            {"labels": f'{rows}{{status="ok"}}', "value": 70},
                            {"labels": f'{rows}{{status="failed"}}', "value": 5},
                        ],
                    },
                    {"expr": flagged, "eval_time": "500m", "exp_samples": [{"labels": flagged, "value": 0.25}]},
                ],
            }
        ],
    }
    check_rules(tmp_path, test)


@needs_promtool
def test_the_share_of_flagged_images_where_none_is_allowed_and_where_nothing_was_decided(tmp_path: Path) -> None:
    rules(tmp_path)
    (flagged,) = (f"panel:{panel['id']}_A" for panel in panels() if panel["title"] == "Flagged")
    reviewed = {"name": "ray_vlmflow_decisions_total", "catalog": "c", "decision": "review", "WorkerId": "w"}
    tests = [
        {
            "interval": "1m",
            "input_series": [series(values=values, **reviewed)] if values else [],
            "promql_expr_test": [{"expr": flagged, "eval_time": "500m", "exp_samples": shown}],
        }
        for values, shown in (
            ("_x300 30 30x290", [{"labels": flagged, "value": 1}]),  # as under `accept_unbound`
            ("30x600", []),  # by an earlier run
            (None, []),
        )
    ]
    check_rules(tmp_path, {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests})
