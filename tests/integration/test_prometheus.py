"""A real Prometheus, with the configuration of the deployment, on a Ray cluster that asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.util import get_node_ip_address

from tests.processes import ROOT, free_port, started, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)"),
]


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url).status_code == 200
    return False


def prometheus_config(folder: Path, dashboard: str, token: Path) -> Path:
    """The deployment's, for a cluster of this machine, and in a hurry."""
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8")
    for old, new in (
        ("ray-head:8265", dashboard),
        ("/run/secrets/ray_token", str(token)),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("refresh_interval: 30s", "refresh_interval: 2s"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "prometheus.yml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_dashboard_shows_a_run_of_a_cluster_that_asks_for_a_token(tmp_path: Path) -> None:
    token = tmp_path / "ray_token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    port, dashboard, agent, web = (free_port() for _ in range(4))
    address = get_node_ip_address()
    short = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # sockets have short names only
    head = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2",
        "--port", str(port), "--include-dashboard", "true", "--dashboard-host", "0.0.0.0",
        "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent), "--disable-usage-stats",
        "--object-store-memory", str(200 * 1024 * 1024), "--temp-dir", str(short),
    ]  # fmt: skip
    config = prometheus_config(tmp_path, f"{address}:{dashboard}", token)
    prometheus = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    prometheus.append(f"--web.listen-address=127.0.0.1:{web}")
    enrich = [sys.executable, "-m", "vlmflow", "enrich", str(ROOT / "vlmflow/starter/demo"), str(tmp_path / "catalog")]
    enrich += ["--profile", "starter", "--tasks", "embed,moderate", "--ray-address", f"{address}:{port}", "--json"]

    def ask(query: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"http://127.0.0.1:{web}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        ray_process = stack.enter_context(started(head, tmp_path / "head.log", environment=environment))
        wait_for(lambda: answers(f"http://{address}:{agent}/api/healthz"), ray_process)
        with started(prometheus, tmp_path / "prometheus.log") as process:
            wait_for(lambda: answers(f"http://127.0.0.1:{web}/-/ready"), process)
            done = subprocess.run(enrich, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout.splitlines()[-1])
            wait_for(
                lambda: bool(ask("ray_vlmflow_images_total") and ask("ray_vlmflow_batch_images_count")), seconds=60
            )

            panels = {
                panel["title"]: panel["targets"][0]["expr"].replace("$__range", "30m").replace("$catalog", ".*")
                for panel in json.loads((ROOT / "deploy/grafana/vlmflow.json").read_text(encoding="utf-8"))["panels"]
                if panel["type"] == "stat"
            }
            rows = ask(panels["Rows committed, by status"])
            assert {row["metric"]["status"]: int(row["value"][1]) for row in rows} == report["statuses"]
            rows = ask(panels["Decisions"])
            assert {row["metric"]["decision"]: int(row["value"][1]) for row in rows} == report["decisions"]
            assert all(int(row["value"][1]) == 1 for row in ask('up{job="ray"}'))
