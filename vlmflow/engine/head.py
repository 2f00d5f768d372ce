"""The head of the cluster: where none is, Ray tries for minutes; where it goes, it ends the process after one.

Both without a word or a record. So it does seconds after a process of an embedded Ray has died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator

from ray._private import worker as ray_worker
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

from vlmflow.errors import ClusterError

logger = logging.getLogger("vlmflow")

_POLL_S = 5.0
# For a head that is just being started.
_PATIENCE_S, _SOON_S = 20.0, 0.5
_HOST_AND_PORT = re.compile(r"[^/]+:\d{1,5}")
_SETTINGS = 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
_ANSWER_S = 2.0
_STRANGER = (
    "what listens there is no head of a Ray cluster (whose port is 6379 unless `ray start` was given another; 8265 is "
    "the dashboard's)"
)
# Of the time after which Ray ends the process.
_PART = 2 / 3


_watches: list[_Watch] = []  # of a process one, at most


@contextlib.contextmanager
def watched(address: str, patience_s: float) -> Iterator[None]:
    """Looks in a thread whether the head still answers, while the block runs.

    Args:
        address: of its control store.
        patience_s: for so long Ray waits for a head that may be started again, before it ends the process.
    """
    watch = _Watch(address, _PART * patience_s)
    threading.Thread(target=watch.run, name="vlmflow-head", daemon=True).start()
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
        watch.stop.set()


def await_head(address: str) -> None:
    """Waits a little for somebody to listen at an address, where it is one of a host and a port.

    Raises:
        OSError: nobody does, or it is no head of a cluster, for which Ray would wait for minutes.
    """
    if not _HOST_AND_PORT.fullmatch(address):
        return  # Ray finds it itself, or it is refused
    until = time.monotonic() + _PATIENCE_S
    while (refusal := _refusal(address)) is not None:
        if time.monotonic() > until:
            raise refusal
        time.sleep(_SOON_S)
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true") and _is_stranger(address):
        raise OSError(_STRANGER)


def _is_stranger(address: str) -> bool:
    """Whether what listens there answers otherwise than gRPC does: with a frame SETTINGS of HTTP/2 (RFC 9113, 3.4)."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            connection.sendall(_PREFACE)
            first = connection.recv(9)
    except OSError:
        return False  # it says nothing, as a head that is busy: Ray is to find out
    return len(first) > 3 and first[3] != _SETTINGS


def is_lost() -> bool:
    """Whether the head has not answered for long: what asks it for anything would outlast this process."""
    return any(watch.lost is not None for watch in _watches)


def check_head() -> None:
    """To be called now and then by who waits for the cluster.

    Raises:
        ClusterError: its head has not answered for long.
    """
    for watch in _watches:
        if watch.lost is not None:
            raise watch.lost


class _Watch:
    def __init__(self, address: str, max_silence_s: float) -> None:
        self._address, self._max_silence_s = address, max_silence_s
        self.lost: ClusterError | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        answered_at = time.monotonic()
        while not self.stop.wait(_POLL_S):
            if (dead := _dead_process()) is not None:
                message = f"a process of the embedded Ray has ended: {dead}"
                self.lost = ClusterError(message, remedy=_ALIVE)
                logger.error("%s: Ray will end this process", message)
                return
            if self._answers():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > self._max_silence_s:
                message = (
                    f"the head of the Ray cluster at {self._address} has not answered for {self._max_silence_s:.0f} s"
                )
                self.lost = ClusterError(message, remedy=_REMEDY)
                # Who waits for Ray otherwise does not come to ask.
                logger.error("%s: Ray will end this process", message)
                return

    def _answers(self) -> bool:
        return _refusal(self._address) is None


def _dead_process() -> str | None:
    """The name of a process that an embedded Ray cannot do without, and that has ended; None: all live, or none is."""
    node = ray_worker._global_node
    dead = [] if node is None else node.dead_processes()
    return next((name for name, _ in dead if name in _NEEDED), None)


def _refusal(address: str) -> OSError | None:
    """Why nothing can be asked at an address; None: somebody listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_S).close()
    except OSError as error:
        return error
    except (OverflowError, UnicodeError) as error:  # of a port, or of a name, that there cannot be
        return OSError(str(error))
    return None


_NEEDED = (PROCESS_TYPE_RAYLET, PROCESS_TYPE_GCS_SERVER)
_ALIVE = (
    "What was committed stays. See that the machine has memory to spare, as the kernel's log tells, and that enough "
    "files may be open (`ulimit -n`); then run the same command again to go on. Ray's logs are in RAY_TMPDIR, else "
    "/tmp, in ray/session_latest/logs."
)
_REMEDY = "What was committed stays. See that the head runs, then run the same command again to go on."
