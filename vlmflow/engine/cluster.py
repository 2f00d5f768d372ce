"""The Ray cluster of a run: an embedded one by default, an existing one by its address."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.data import DataContext
from ray.util.client import ray as client

from vlmflow.config import RayConfig
from vlmflow.engine.allowance import allowance
from vlmflow.engine.authentication import ensure_token
from vlmflow.engine.faults import told
from vlmflow.engine.growth import NodeGroup, node_groups
from vlmflow.engine.head import await_head, watched
from vlmflow.engine.import_paths import own_import_paths
from vlmflow.errors import ClusterError, ConfigError

# Ray Data logs every execution plan and every operator at INFO; our own progress says what a user needs.
_QUIET_LOGGERS = ("ray", "ray.data", "ray.data._internal", "ray.util")
_MAX_EVENT_CHARS = 300
_OF_NODES = ("raylet", "autoscaler")  # as Ray calls what is no worker
SHARED_MEMORY = Path("/dev/shm")
_HEAD_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"

logger = logging.getLogger("vlmflow")


@dataclass(frozen=True)
class Cluster:
    """What the cluster offers now.

    Attributes:
        cpus: CPUs of all nodes.
        gpus: GPUs of all nodes.
        embedded: started by this process, and stopped with it.
        memory: bytes of all nodes that Ray leaves to workers, beside its object store; inf: not known.
        nodes: CPUs and GPUs of each node; none: there is one.
        groups: of nodes that its autoscaler may start; none: it does not grow, or that is not known.
        slow_store: why the object store of an embedded one is slow; empty: it is not.
    """

    cpus: float
    gpus: float
    num_nodes: int
    embedded: bool
    memory: float = math.inf
    nodes: tuple[tuple[float, float], ...] = ()
    groups: tuple[NodeGroup, ...] = ()
    slow_store: str = ""

    @property
    def grown(self) -> Cluster:
        """The cluster when it has all nodes that it may have; as it is where nothing is known of others."""
        if not self.groups:
            return self
        return dataclasses.replace(
            self,
            cpus=max(self.cpus, sum(group.max_nodes * group.cpus for group in self.groups)),
            gpus=max(self.gpus, sum(group.max_nodes * group.gpus for group in self.groups)),
            num_nodes=max(self.num_nodes, sum(group.max_nodes for group in self.groups)),
            memory=max(self.memory, sum(group.max_nodes * group.memory for group in self.groups)),
            nodes=(*self.nodes, *((group.cpus, group.gpus) for group in self.groups)),
            groups=(),
        )

    def has_node_for(self, cpus: float, gpus: float = 0.0) -> bool:
        """Whether a node of the cluster has so many CPUs and GPUs at once."""
        return any(cpus <= node[0] and gpus <= node[1] for node in self.nodes or ((self.cpus, self.gpus),))

    def tell(self) -> None:
        """Logs what makes a run slower than it could be here."""
        if self.slow_store:
            logger.warning("%s. %s", self.slow_store, MORE_SHARED_MEMORY)

    @contextlib.contextmanager
    def worker_errors(self) -> Iterator[WorkerErrors]:
        """Collects what Ray Data logs of blocks that it gave up, instead of printing tracebacks to the user."""
        errors = WorkerErrors()
        logging.getLogger("ray.data").addHandler(errors)
        try:
            yield errors
        finally:
            logging.getLogger("ray.data").removeHandler(errors)


class WorkerErrors(logging.Handler):
    """Remembers the first failures that Ray Data logged."""

    _MAX_KEPT = 10

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the exception's last line, or the first line of the message."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or len(self._messages) >= self._MAX_KEPT:
            return
        lines = [line for line in str(error).splitlines() if line.strip()]
        self._messages.append(f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300])

    def first(self) -> str | None:
        """The first failure; None if no block was given up."""
        return self._messages[0] if self._messages else None


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


@contextlib.contextmanager
def ray_cluster(config: RayConfig) -> Iterator[Cluster]:
    """Connects to the cluster, or starts an embedded one, for the duration of the block.

    A cluster that this process is already connected to is used as it is, and left running. Blocks in several threads
    share one, until the last has ended.

    Raises:
        ClusterError: no cluster answers at the address, an embedded one does not start, another block is at work on
            another cluster, or Ray raised in the block.
        ConfigError: this is a job of a Ray cluster, and no address is given; the address is that of Ray's client; or
            the cluster has other versions of Ray or Python.
    """
    already = _connection.join(config)
    # A run of few images has fewer blocks than actors; that is no concern of the user's.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors", category=UserWarning)
    for logger in _QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with told():
            resources, nodes = ray.cluster_resources(), nodes_now()
            embedded = not already and config.address is None
            yield Cluster(
                cpus=resources.get("CPU", 0.0),
                gpus=resources.get("GPU", 0.0),
                num_nodes=len(nodes),
                embedded=embedded,
                memory=resources.get("memory", math.inf),
                nodes=nodes,
                groups=() if embedded else node_groups(),
                slow_store=_connection.slow_store if embedded else "",
            )
    finally:
        _connection.leave()


def nodes_now() -> tuple[tuple[float, float], ...]:
    """CPUs and GPUs of each node that the cluster has at this moment."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return tuple((resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive)


def _free_bytes() -> float:
    """Of shared memory; inf: that is not known."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf


def _slow_store(free_before: float) -> str:
    """Ray puts its object store on a disk where shared memory has less room, and says so in a log that nobody reads."""
    num_bytes = ray.cluster_resources().get("object_store_memory", 0.0)
    if num_bytes <= free_before:
        return ""
    found = f"{SHARED_MEMORY} has {free_before / 1e9:.2f} GB free"
    return f"decoded images go through a disk: {found}, and Ray's object store takes {num_bytes / 1e9:.1f} GB"


class _Connection:
    """What a process has one of, and all blocks share: its connection to a cluster, and Ray Data's settings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._configs: list[RayConfig] = []  # of the blocks that have not ended
        self._is_callers = False
        self._undo = contextlib.ExitStack()
        self.slow_store = ""  # of the embedded cluster, as Ray found shared memory: what runs put there takes of it

    def join(self, config: RayConfig) -> bool:
        """Connects, unless that is done; returns whether the caller had, before any block."""
        with self._lock:
            if not self._configs:
                self._is_callers = ray.is_initialized()
                with contextlib.ExitStack() as undo:
                    if not self._is_callers:
                        undo.callback(ray.shutdown)  # also of what comes about half
                        free = _free_bytes()
                        if config.address is not None:
                            _await_head(config.address)
                        _connect(config)
                        self.slow_store = _slow_store(free) if config.address is None else ""
                    _refuse_client()
                    undo.enter_context(_our_settings())
                    undo.enter_context(watched(ray.get_runtime_context().gcs_address, _head_patience_s()))
                    self._undo = undo.pop_all()
            elif not self._is_callers and config != self._configs[0]:
                first, second = (one.model_dump_json(exclude_defaults=True) for one in (self._configs[0], config))
                raise ClusterError(
                    f"this process is at work on the cluster of ray: {first}, and can have none of ray: {second} now",
                    remedy="Give both jobs the same `ray`, let one end first, or run them in two processes.",
                )
            self._configs.append(config)
            return self._is_callers

    def leave(self) -> None:
        """Disconnects if no block is left, and the caller had not connected."""
        with self._lock:
            self._configs.pop()
            if not self._configs:
                self._undo.close()


_connection = _Connection()


@contextlib.contextmanager
def _our_settings() -> Iterator[None]:
    """Ray Data as runs need it, and silent: what it logs of blocks that it gave up are tracebacks."""
    context, ray_data = DataContext.get_current(), logging.getLogger("ray.data")
    before = {name: getattr(context, name) for name in _DATA_CONTEXT}
    handlers, propagates = list(ray_data.handlers), ray_data.propagate
    for name, value in _DATA_CONTEXT.items():
        setattr(context, name, value)
    ray_data.handlers = [handler for handler in handlers if not _is_console(handler)]
    ray_data.propagate = False
    printing = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = partial(_log_event, printing)
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = printing
        for name, value in before.items():
            setattr(context, name, value)
        ray_data.handlers, ray_data.propagate = handlers, propagates


def _log_event(printing: Callable[..., None], event: dict[str, Any], **options: object) -> None:
    """Logs what a node says: that another is gone, that memory runs out. Ray prints it among what a command gives.

    What workers print is left to Ray: where it comes to the driver, the caller has asked for that.
    """
    if event.get("pid") not in _OF_NODES:
        printing(event, **options)
        return
    for text in event["lines"]:
        logger.info("Ray: %s", text.strip().partition("\n")[0][:_MAX_EVENT_CHARS])


# A poison image kills its worker again and again, and Ray Data would retry it for ever or end the job: a bounded
# number of deaths costs its block, whose keys reconciling then finds.
_DATA_CONTEXT: dict[str, object] = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "enable_auto_log_stats": False,
    "raise_original_map_exception": True,
    "max_errored_blocks": -1,
}


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """Keeps Ray's C++ side from announcing its log level; what goes wrong comes as an exception all the same."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _own_termination() -> Iterator[None]:
    """Keeps the handler of SIGTERM that a caller has set, which Ray replaces with one that just exits.

    While Ray starts that one is in place: it ends what was started so far. Then the caller's has its turn.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _await_head(address: str) -> None:
    """Of `auto` the address is that which Ray is given for it, if any."""
    given = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    try:
        await_head(given)
    except OSError as error:
        raise ClusterError(f"Ray at {given} does not answer: {error.strerror or error}", remedy=_AT_ADDRESS) from error


def _connect(config: RayConfig) -> None:
    # Ray would announce coming changes, its usage statistics, and on standard error every actor that may restart.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # What nobody waits for may fail: Ray Data's counts, which a restarted actor of its own does not know, every 5 s.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A task whose worker is killed for want of memory is not retried by the count for other deaths but without end; one
    # image that takes too much would hold the run up for ever. Over a minute: it may have been the fault of others.
    os.environ.setdefault("RAY_task_oom_retries", "6")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
            raise ConfigError(
                "this is a job of a Ray cluster, and an embedded Ray would compute on this node alone",
                remedy="Give --ray-address auto, or ray: {address: auto} in the job file.",
            )
        options |= allowance(config)
        # Without this Ray would join what RAY_ADDRESS names, or a cluster that it finds on this machine.
        options |= {"include_dashboard": False, "address": "local"}
        ensure_token()
    else:
        options |= {"address": config.address}
    try:
        with _without_standard_error(), _own_termination():
            ray.init(**options, job_config=own_import_paths())
    except Exception as error:  # Ray raises that itself, of a node that does not come up in time
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if config.address is None:
            raise ClusterError(f"an embedded Ray does not start: {reason}", remedy=_remedy(reason)) from error
        if versions := _OTHER_VERSIONS.search(str(error)):
            theirs_ray, theirs_python, our_ray, our_python = versions.groups()
            raise ConfigError(
                f"the cluster at {config.address} runs Ray {theirs_ray} on Python {theirs_python}, "
                f"this process Ray {our_ray} on Python {our_python}",
                remedy="Install the cluster's versions here, or submit the job to the cluster, which then runs it: "
                "`python -m pipelines.adhoc --help`.",
            ) from error
        raise ClusterError(f"Ray at {config.address} does not answer: {reason}", remedy=_AT_ADDRESS) from error


def _head_patience_s() -> float:
    return float(os.environ.get(_HEAD_PATIENCE) or 60)  # Ray's default


def _refuse_client() -> None:
    """Ray Data runs where the driver is, and needs more of it than Ray's client has."""
    if client.is_connected():
        raise ConfigError(
            "a connection through Ray's client (ray://) does not do: Ray Data needs a driver within the cluster",
            remedy="Give the address of the cluster's head, such as head:6379, on a machine that reaches all nodes, or "
            "submit the job to the cluster: `python -m pipelines.adhoc --help`.",
        )


# Ray wants a driver to have the cluster's, down to the last number of Python's, and says so in six lines.
_OTHER_VERSIONS = re.compile(".*".join(2 * [r"Ray: (\S+)\s+Python: (\S+)"]), re.DOTALL)
MORE_SHARED_MEMORY = (
    "Give the container more (docker run --shm-size; in Kubernetes an emptyDir of medium Memory at /dev/shm), or its "
    "object store less (ray.object_store_bytes; of nodes `ray start --object-store-memory`)."
)


def _remedy(reason: str) -> str:
    """Against an embedded Ray that does not start."""
    if "AF_UNIX path length" in reason:
        return _SHORTER
    return _PATIENT if "error" in os.environ.get("PYTHONWARNINGS", "") else _EMBEDDED


_PATIENT = "Take `error` out of PYTHONWARNINGS: Ray's own processes end at the first warning then."
_SHORTER = "Set RAY_TMPDIR to a folder with a shorter path: the system's limit for sockets counts all of theirs."
_EMBEDDED = (
    "See that the machine has memory to spare and is not busy with other work, for Ray waits half a minute, and that "
    "there is room for Ray's temporary files in a folder that can be written to: RAY_TMPDIR, else /tmp. Its logs are "
    "there, in ray/session_latest/logs."
)
_AT_ADDRESS = (
    "Check the address; `vlmflow doctor` tests it. A cluster that asks for Ray's token, as one of `ray start` often "
    "does, wants RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token or in the file that RAY_AUTH_TOKEN_PATH names."
)
