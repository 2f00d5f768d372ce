"""What tests of the flows share: a Prefect server's answers, flows as processes, images that come when they may."""

from __future__ import annotations

import http.server
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.pictures import picture
from tests.processes import ROOT, prefect_environment, started, wait_for
from vlmflow.config import Job


@dataclass(frozen=True)
class Prefect:
    """A Prefect server, and the home of those who talk to it."""

    api: str
    home: Path

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """The newest artifact of each key, the catalog's part of the key left out."""
        found = self._ask("artifacts/latest/filter", {})
        ordered = sorted(found, key=lambda artifact: artifact["updated"])
        return {re.sub(r"-catalog-[0-9a-f]{6}", "", artifact["key"]): artifact for artifact in ordered}

    def events(self, name: str) -> list[dict[str, Any]]:
        asked = {"filter": {"event": {"name": [name]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}}
        return list(self._ask("events/filter", asked)["events"])

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow that have started, the newest first."""
        asked = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC"}
        return [run for run in self._ask("flow_runs/filter", asked) if run["start_time"] is not None]

    def waiting(self) -> list[dict[str, Any]]:
        """The runs that wait for their time, as those of a schedule do for days."""
        return list(self._ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}))

    def artifacts_of(self, run_id: str) -> list[dict[str, Any]]:
        asked = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
        return list(self._ask("artifacts/filter", asked))

    def deployments(self) -> list[dict[str, Any]]:
        return list(self._ask("deployments/filter", {}))

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(httpx.get(f"{self.api}/flow_runs/{run_id}", timeout=60).json())

    def log(self, run_id: str) -> str:
        """What a flow run has logged."""
        asked = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self._ask("logs/filter", asked))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command `prefect`, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        return os.environ | prefect_environment(self.home, self.api)

    def _ask(self, path: str, asked: dict[str, Any]) -> Any:
        answer = httpx.post(f"{self.api}/{path}", json=asked, timeout=60)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def process(prefect: Prefect, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python module that talks to the server, as a process."""
    with started([sys.executable, "-m", *arguments], log, environment=prefect.environment()) as running:
        yield running


@contextmanager
def worker(prefect: Prefect, log: Path) -> Iterator[None]:
    """All of deploy/prefect.yaml deployed, and a worker that runs what is asked for."""
    made = prefect.command("work-pool", "create", "vlmflow", "--type", "process")
    assert made.returncode == 0, made.stdout + made.stderr
    deployed = prefect.command("deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    with process(prefect, log, "prefect", "worker", "start", "--pool", "vlmflow") as running:
        wait_for(lambda: b"started!" in log.read_bytes(), running)
        yield


def write_job(job: Job, path: Path) -> Path:
    path.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    return path


class HeldImages(http.server.ThreadingHTTPServer):
    """Images at urls that are not served before they are released: a run over them is in the middle for as long.

    The first ``num_free`` are served at once.
    """

    request_queue_size = 128

    def __init__(self, num_free: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_free = num_free
        self.asked, self.released = threading.Event(), threading.Event()

    def manifest(self, path: Path, num_images: int) -> Path:
        """Writes a manifest of images that the server holds."""
        lines = [f"http://127.0.0.1:{self.server_port}/{number}.png" for number in range(num_images)]
        path.write_text("\n".join(["uri", *lines]) + "\n", encoding="utf-8")
        return path


def held_job(held: HeldImages, make_job: Callable[..., Job], folder: Path, num_images: int) -> Path:
    """Writes a job that is in the middle until its images are released."""
    http = {"allow_private_addresses": True, "timeout_s": 250}
    pools = [{"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 4}]
    manifest = held.manifest(folder / "images.csv", num_images)
    job = make_job(manifest, source_options={"http": http}, tasks=("embed", "moderate"), pools=pools)
    return write_job(job, folder / "job.yaml")


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, HeldImages)
        server.asked.set()
        number = int(self.path.strip("/").partition(".")[0])
        if number >= server.num_free:
            server.released.wait(300)
        sink = io.BytesIO()
        picture(number).save(sink, "PNG")
        self.send_response(200)
        self.send_header("ETag", f'"{self.path}"')
        self.send_header("Content-Length", str(sink.tell()))
        self.end_headers()
        self.wfile.write(sink.getvalue())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def held_images(num_free: int = 0) -> Iterator[HeldImages]:
    with HeldImages(num_free) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
