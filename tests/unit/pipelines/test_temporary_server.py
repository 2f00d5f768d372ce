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
from tests.processes import ROOT, wait_for
from vlmflow.errors import FlowServerError

# As much of Prefect as the server's process imports, for it takes half a minute on a busy machine.
STAND_IN = {
    "prefect/__init__.py": "",
    "prefect/server/__init__.py": "",
    "prefect/server/api/__init__.py": "",
    "prefect/server/api/server.py": """
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
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = temporary_server.start_process(bound, environment, **pipes)
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
        process.send_signal(signal.SIGINT)  # while it is born
        wait_for(lambda: answers(address), process)
        for ends in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(ends)
        assert answers(address)
        out, _ = process.communicate(timeout=60)  # which closes the pipe first, as the death of its holder does
    assert (process.returncode, out) == (0, b"ended in order\n")


@pytest.fixture
def server(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[temporary_server.TemporaryServer]:
    """A flow's, with the stand-in in Prefect's place, behind a proxy of the environment that is not there."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ".shop")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    made = object.__new__(temporary_server.TemporaryServer)  # Prefect has one in all
    made.__init__()  # type: ignore[misc]
    yield made
    made.stop()


def test_a_proxy_of_the_environment_is_passed_by(server: temporary_server.TemporaryServer) -> None:
    server.start(timeout=60)
    assert httpx.get(f"{server.api_url}/health", timeout=10).status_code == 200  # as Prefect's clients ask it
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == ".shop,127.0.0.1"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("startup.complete", "startup.failed", ""),
        ("def create_app", "import nothing_of_the_kind\n\ndef create_app", "No module named 'nothing_of_the_kind'"),
    ],
)
def test_one_that_cannot_start_is_told_of_at_once(
    old: str,
    new: str,
    said: str,
    server: temporary_server.TemporaryServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As of a package that is absent, or a database that cannot be written: Prefect waits until the time is up."""
    app = tmp_path / "prefect/server/api/server.py"
    app.write_text(app.read_text().replace(old, new))
    with pytest.raises(FlowServerError, match="ended, exit code 3"):
        server.start(timeout=60)
    shown = capfd.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:4200/api"])
def test_it_is_the_one_that_prefect_uses_and_with_a_server_that_stays_there_is_none(
    url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    asked: list[str] = []
    monkeypatch.setattr(command_line, "check_named_server", asked.append)
    monkeypatch.setattr(SubprocessASGIServer, "_instances", {})
    monkeypatch.setattr(temporary_server.TemporaryServer, "start", lambda _, timeout: started.append(timeout))
    here = {PREFECT_SERVER_EPHEMERAL_ENABLED: True} | ({PREFECT_API_URL: url} if url else {})
    with temporary_settings(here, restore_defaults=set() if url else {PREFECT_API_URL}):
        command_line._start_server()
    assert len(started) == (url is None)
    assert asked == ([url] if url else [])
    assert isinstance(SubprocessASGIServer(), temporary_server.TemporaryServer) == (url is None)


@contextmanager
def as_by_default() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGHUP])
def test_a_flow_that_is_ended_from_outside_says_so_and_ends_in_time(
    ends: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(command_line, "end_within", lambda *limit: limits.append(limit))
    monkeypatch.setattr(command_line, "_start_server", lambda: None)
    monkeypatch.setattr(Flow, "__call__", lambda *_, **__: signal.raise_signal(ends))
    with as_by_default(), pytest.raises(SystemExit) as left:
        command_line.main(nightly_enrichment, ["--job-file", "job.yaml"])
    assert left.value.code == 130
    assert [code for _, code in limits] == [130]
    assert "interrupted" in capsys.readouterr().err


def test_so_it_does_while_it_reads_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "end_within", lambda *_: None)
    monkeypatch.setattr(command_line, "_parser", lambda _: signal.raise_signal(signal.SIGTERM))
    with as_by_default(), pytest.raises(SystemExit) as left:
        command_line.main(nightly_enrichment, [])
    assert left.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_so_it_does_while_it_is_imported(ends: signal.Signals, tmp_path: Path) -> None:
    """Which takes ten seconds of Prefect: here of a module that waits in its place."""
    (tmp_path / "prefect").mkdir()
    waits = "import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)"
    (tmp_path / "prefect/__init__.py").write_text(waits)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "pipelines.backfill"]

    def by_default() -> None:  # as in no background job, and without nohup
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, preexec_fn=by_default
    ) as process:
        wait_for((tmp_path / "here").exists, process)
        process.send_signal(ends)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, b"backfill: interrupted\n")


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
