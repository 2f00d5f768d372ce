"""The temporary Prefect server of a flow: signals that end the flow do not end it before, and the flow's end does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import Flow
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings
from prefect.states import Completed

from pipelines import command_line, temporary_server
from pipelines.nightly import nightly_enrichment
from tests.processes import wait_for

# As much of Prefect as the server's process imports, for it takes half a minute on a busy machine.
STAND_IN = {
    "prefect/__init__.py": "",
    "prefect/settings.py": "get_current_settings = None",
    "prefect/server/__init__.py": "",
    "prefect/server/api/__init__.py": "",
    "prefect/server/api/server.py": """
class SubprocessASGIServer:
    pass


def create_app():
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            print("ended in order", flush=True)
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@contextmanager
def serving(environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server's process, which has been given a port, and its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        command = [sys.executable, "-P", temporary_server.__file__, str(bound.fileno())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, pass_fds=[bound.fileno()], **pipes)  # type: ignore[call-overload]
    with process:
        try:
            yield process, address
        finally:
            process.kill()


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=10).status_code == 200
    except httpx.ConnectError:
        return False


def test_it_outlives_what_ends_the_flow_and_ends_in_order_with_its_process(environment: dict[str, str]) -> None:
    with serving(environment) as (process, address):
        wait_for(lambda: answers(address), process)
        for ends in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(ends)
        assert answers(address)
        out, _ = process.communicate(timeout=60)  # which closes the pipe first, as the death of its holder does
    assert (process.returncode, out) == (0, b"ended in order\n")


def test_one_that_cannot_start_says_so_as_prefect_expects(environment: dict[str, str], tmp_path: Path) -> None:
    """Also while the flow's process holds the pipe, as it does."""
    app = tmp_path / "prefect/server/api/server.py"
    app.write_text(app.read_text().replace("startup.complete", "startup.failed"))
    with serving(environment) as (process, _):
        assert process.wait(60) == 3
        assert process.stderr is not None
        assert b"Fatal" not in process.stderr.read()


def test_one_that_cannot_start_is_not_started_again_and_again() -> None:
    """As of a database that cannot be written: Prefect gives such a server port after port, and never gives up."""
    server = new_server()
    server.server_process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with server.server_process, pytest.raises(RuntimeError, match="cannot start; what it says stands above"):
        server.find_available_port()


def new_server() -> temporary_server.TemporaryServer:
    """One of its own, where Prefect has one in all."""
    server = object.__new__(temporary_server.TemporaryServer)
    server.__init__()  # type: ignore[misc]
    return server


def test_no_other_flow_is_given_its_port() -> None:
    """Not before its process listens, which takes half a minute: Prefect would take the other's server for its own."""
    first, second = new_server(), new_server()
    port = first.find_available_port()
    assert not first.is_port_available(port)
    assert second.find_available_port() != port
    for server in (first, second):
        server._socket.close()


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:4200/api"])
def test_it_is_the_one_that_prefect_uses_and_with_a_server_that_stays_there_is_none(
    url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(temporary_server.subprocess, "Popen", lambda command, **_: started.append(command))
    monkeypatch.setattr(SubprocessASGIServer, "_instances", {})

    def start(server: temporary_server.TemporaryServer, timeout: int) -> None:
        server.find_available_port()
        server._run_uvicorn_command()

    monkeypatch.setattr(SubprocessASGIServer, "start", start)
    here = {PREFECT_SERVER_EPHEMERAL_ENABLED: True} | ({PREFECT_API_URL: url} if url else {})
    with temporary_settings(here, restore_defaults=set() if url else {PREFECT_API_URL}):
        command_line._start_server()
    assert [command[2] for command in started] == ([] if url else [temporary_server.__file__])
    assert isinstance(SubprocessASGIServer(), temporary_server.TemporaryServer) == (url is None)


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGHUP])
def test_a_flow_that_is_ended_from_outside_says_so_and_ends_in_time(
    ends: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(command_line, "end_within", lambda *limit: limits.append(limit))
    monkeypatch.setattr(command_line, "_start_server", lambda: None)
    monkeypatch.setattr(Flow, "__call__", lambda *_, **__: signal.raise_signal(ends))
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as left:
            command_line.main(nightly_enrichment, ["--job-file", "job.yaml"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == 130
    assert [code for _, code in limits] == [130]
    assert "interrupted" in capsys.readouterr().err


def test_a_flow_that_is_to_outlive_its_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return Completed(message="2 rows new.")

    monkeypatch.setattr(command_line, "_start_server", lambda: None)
    monkeypatch.setattr(Flow, "__call__", call)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)  # as `nohup` does
    try:
        command_line.main(nightly_enrichment, ["--job-file", "job.yaml"])
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
