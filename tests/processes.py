"""Processes that tests start and end: a Ray cluster of two nodes, a Prefect server. None outlives its test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.util import get_node_ip_address

ROOT = Path(__file__).parents[1]
_TICK_S = 0.05
_NODE_TRIES = 3


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any] | None = None, seconds: float = 200) -> None:
    """Waits until a condition holds; a process that it depends on must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(_TICK_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    errors: Path | None = None,
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with it all that it started.

    What it says goes to files, standard error to one of its own if there is one: a pipe that nobody reads fills up, and
    one that is read has no end before that of the last who may write into it.
    """
    with log.open("wb") as out, errors.open("wb") if errors else nullcontext(out) as err:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True)
    try:
        yield process
    finally:
        end_family(process)


def end_family(process: subprocess.Popen[Any]) -> None:
    """Kills a process of ours and all that it started, what outlived it included if it led a session.

    A cluster of Ray takes seconds to see that its driver is gone.
    """
    while family := _family(process):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        time.sleep(_TICK_S)


def _family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    found: set[psutil.Process] = set()
    if process.poll() is None:
        found = {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
    elif psutil.pid_exists(process.pid):
        return []  # the number is another's by now
    for member in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(member.pid) == process.pid and member.status() != psutil.STATUS_ZOMBIE:
                found.add(member)
    return list(found)


@dataclass(frozen=True)
class RayNodes:
    """A head and a node of a Ray cluster.

    Attributes:
        jobs_url: of the dashboard; empty: there is none.
    """

    address: str
    jobs_url: str
    head: subprocess.Popen[bytes]
    node: subprocess.Popen[bytes]


@contextmanager
def ray_nodes(folder: Path, *, dashboard: bool = False, cpus: int = 1) -> Iterator[RayNodes]:
    """A head and a node, as processes of this test."""
    port, dashboard_port = free_port(), free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", str(cpus)]
    ray += ["--object-store-memory", str(150 * 1024 * 1024), "--disable-usage-stats"]
    # The usual port of the agents may be another cluster's; without its agent the head runs no jobs.
    agents = [["--dashboard-agent-listen-port", str(free_port())] for _ in range(2)]
    # A token would have to reach all processes; the cluster lives as long as this test, on this machine.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    # The command of a Ray job is looked for in the path, and is `python`.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    address = f"{get_node_ip_address()}:{port}"
    short = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # sockets have short names only
    head = [*ray, "--head", "--port", str(port), "--temp-dir", str(short)]
    head += ["--include-dashboard", str(dashboard).lower(), "--dashboard-port", str(dashboard_port), *agents[0]]
    node = [*ray, "--address", address, *agents[1]]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        processes: list[subprocess.Popen[bytes]] = []
        for number, command_line in enumerate((head, node)):
            log = folder / f"ray-{number}.log"

            def start(command_line: list[str] = command_line, log: Path = log) -> subprocess.Popen[bytes]:
                return stack.enter_context(started(command_line, log, environment=environment))

            processes.append(_started_node(start, lambda at=number: num_nodes(address) == at + 1, log))  # type: ignore[misc]
        jobs_url = f"http://127.0.0.1:{dashboard_port}" if dashboard else ""
        if dashboard:
            wait_for(lambda: _takes_jobs(jobs_url), processes[-1])
        yield RayNodes(address, jobs_url, processes[0], processes[1])


def _started_node(
    start: Callable[[], subprocess.Popen[bytes]], is_there: Callable[[], bool], log: Path
) -> subprocess.Popen[bytes]:
    """Tries again where Ray gives up, which it does with a node that has not started after 30 s of a busy machine."""
    for _ in range(_NODE_TRIES):
        process = start()
        wait_for(lambda: is_there() or process.poll() is not None)  # noqa: B023
        if process.poll() is None:
            return process
        end_family(process)
    raise AssertionError(log.read_text()[-3_000:])


def _takes_jobs(jobs_url: str) -> bool:
    """Whether the head has an agent that runs jobs; it comes seconds after the head."""
    try:
        asked = {"entrypoint": "true", "submission_id": "first"}
        answer = httpx.post(f"{jobs_url}/api/jobs/", json=asked, timeout=60)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 or "already" in answer.text


def num_nodes(address: str) -> int:
    """Nodes that the head at this address has; none while it does not answer. A driver that asks takes seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:  # of a head that does not listen yet a client would wait for the first answer for long
        return 0
    nodes = GcsClient(address=address).get_all_node_info(timeout=60)
    return sum(node.state == GcsNodeInfo.ALIVE for node in nodes.values())


@contextmanager
def prefect_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """A Prefect server with the database that is in the folder, or a new one; gives the address of its API."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | prefect_environment(folder, url)
    # What is deployed has the schedule that it ships with: at its hour a worker of the test would run the real night.
    environment["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"] = "false"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with started(command, folder / "prefect-server.log", environment=environment) as server:
        try:
            wait_for(lambda: _answers(f"{url}/health"), server)
            yield url
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(10)


def prefect_environment(folder: Path, url: str) -> dict[str, str]:
    """What processes that talk to the server of a test need."""
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
    }


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
