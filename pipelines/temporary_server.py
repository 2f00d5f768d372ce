"""The temporary Prefect server of a flow on the command line: it lives as long as the flow's process, and no longer.

What ends a flow often reaches its server at once: Ctrl-C in a terminal, a signal to the process group, a service
manager that stops a unit. Prefect would ask a server that is gone for minutes, and tell nobody of the flow's end. So
this one takes no notice of such signals; it ends when a pipe closes that the flow's process holds, however that ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import uvicorn
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

_IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# As Prefect starts its own.
_ENVIRONMENT = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


class TemporaryServer(SubprocessASGIServer):
    """Prefect's own, which Prefect's clients find once it is made, with another process."""

    def find_available_port(self) -> int:
        """A port that is held until the process has it: of two flows, neither may come upon the other's.

        Raises:
            RuntimeError: Prefect asks for another, as of a process that cannot start; it would, again and again.
        """
        if self.server_process is not None:
            raise RuntimeError("the temporary server cannot start; what it says stands above")
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        return int(self._socket.getsockname()[1])

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        with self._socket as bound:
            # -P: the modules beside this one are not to be found under their short names.
            command = [sys.executable, "-P", __file__, str(bound.fileno())]
            environment = {**os.environ, **_ENVIRONMENT, **settings}
            return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[bound.fileno()], env=environment)

    def stop(self) -> None:
        """Ends the process, gracefully for five seconds."""
        if self.server_process and self.server_process.stdin:
            self.server_process.stdin.close()
        super().stop()


def _serve(bound: socket.socket) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)  # uvicorn puts handlers of its own in place of others
    app = "prefect.server.api.server:create_app"
    config = uvicorn.Config(app, factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def end_with_flow() -> None:
        # Not through a buffer: Python wants its lock when this process ends, and aborts where another thread has it.
        os.read(sys.stdin.fileno(), 1)
        server.should_exit = True

    threading.Thread(target=end_with_flow, daemon=True).start()
    server.run([bound])
    if not server.started:
        sys.exit(3)  # by which Prefect knows, and asks for another port


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
