"""The process of a flow's temporary Prefect server: see :mod:`pipelines.temporary_server`, which starts this file.

It ends when its standard input does, of which the flow's process holds the other end.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

import uvicorn

_APP = "prefect.server.api.server:create_app"
_CANNOT_START = 3  # as uvicorn's own command ends then


def serve(bound: socket.socket) -> None:
    """Serves at a port until the end of standard input; a server that cannot be started says why, and ends."""
    config = uvicorn.Config(_APP, factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def end_with_flow() -> None:
        # Not through a buffer: Python wants its lock when this process ends, and aborts where another thread has it.
        os.read(sys.stdin.fileno(), 1)
        server.should_exit = True

    threading.Thread(target=end_with_flow, daemon=True).start()
    try:
        config.load()
    except Exception as error:  # noqa: BLE001 - whatever Prefect's modules and settings raise
        print("the temporary Prefect server:", type(error).__name__, *str(error).split(), file=sys.stderr)
        sys.exit(_CANNOT_START)
    server.run([bound])
    if not server.started:
        sys.exit(_CANNOT_START)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
