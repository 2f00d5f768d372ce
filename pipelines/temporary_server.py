"""The temporary Prefect server of a flow on the command line: it lives as long as the flow's process, and no longer.

What ends a flow often reaches its server at once: Ctrl-C in a terminal, a signal to the process group, a service
manager that stops a unit. Prefect would ask a server that is gone for minutes, and tell nobody of the flow's end. So
this one takes no notice of such signals; it ends when a pipe closes that the flow's process holds, however that ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from vlmflow.errors import FlowServerError

_IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# As Prefect starts its own.
_ENVIRONMENT = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
_HOST = "127.0.0.1"
_POLL_S = 0.1
_ANSWER_S = 5.0
_PROCESS = Path(__file__).with_name("server_process.py")


class TemporaryServer(SubprocessASGIServer):
    """Prefect's own, which Prefect's clients find once it is made, with another process."""

    def start(self, timeout: int | None = None) -> None:
        """Starts the process and waits until it answers; once.

        Prefect's own waits for a process that has ended until the time is up, and asks through the environment's proxy.

        Args:
            timeout: seconds.

        Raises:
            FlowServerError: the process ends, or does not answer in time.
        """
        if self.running:
            return
        atexit.register(self.stop)
        pass_by_proxies()
        # A port that is held until the process has it: of two flows, neither may come upon the other's.
        with socket.socket() as bound:
            bound.bind((_HOST, 0))
            self.port = int(bound.getsockname()[1])
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            self.server_process = start_process(bound, {**os.environ, **_ENVIRONMENT, **settings})
        until = time.monotonic() + (timeout or 0)
        with httpx.Client(trust_env=False, timeout=_ANSWER_S) as client:
            while not _answers(client, f"{self.api_url}/health"):
                if (code := self.server_process.poll()) is not None:
                    raise FlowServerError(f"the temporary Prefect server ended, exit code {code}", remedy=_SEE_ABOVE)
                if time.monotonic() > until:
                    raise FlowServerError(f"the temporary Prefect server did not answer for {timeout} s", remedy=_SLOW)
                time.sleep(_POLL_S)
        self.running = True

    def stop(self) -> None:
        """Ends the process, gracefully for five seconds."""
        if self.server_process and self.server_process.stdin:
            self.server_process.stdin.close()
        super().stop()


def start_process(bound: socket.socket, environment: dict[str, str], **options: Any) -> subprocess.Popen[Any]:
    """Starts the server's process on a port; its standard input is the pipe whose end ends it.

    Args:
        options: of its standard output and error.
    """
    # -P: the modules beside this one are not to be found under their short names.
    command = [sys.executable, "-P", str(_PROCESS), str(bound.fileno())]
    pipe = subprocess.PIPE
    # It is born with these blocked: its imports alone take long, and what ends it there is a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        return subprocess.Popen(command, stdin=pipe, pass_fds=[bound.fileno()], env=environment, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pass_by_proxies() -> None:
    """Has this process, and those that it starts, reach the server itself where the environment names a proxy."""
    proxies = getproxies_environment()
    beside = [host.strip() for host in proxies.get("no", "").split(",") if host.strip()]
    if proxies.keys() - {"no"} and not {"*", _HOST} & {*beside}:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*beside, _HOST])


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


_SEE_ABOVE = (
    "What it says stands above. See that the packages are whole (`pip check`) and that the folder of PREFECT_HOME has "
    "room and is of this version of Prefect, or set PREFECT_API_URL to the address of a server."
)
_SLOW = (
    "Run again when the machine has less to do, give it longer with PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, "
    "or set PREFECT_API_URL to the address of a server."
)
