"""What Ray is told before it starts."""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from traceback import format_exception
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info, validate_socket_filepath
from ray.data import DataContext
from ray.exceptions import (
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util import get_node_ip_address

from vlmflow.config import RayConfig
from vlmflow.engine import cluster, faults
from vlmflow.errors import (
    ClusterError,
    ConfigError,
    FamilyError,
    ModelMemoryError,
    SourceError,
    VlmflowError,
    WeightsError,
    remedy_noted,
)


@pytest.mark.parametrize(("given", "told"), [(None, "6"), ("1", "1")])
def test_what_takes_too_much_memory_is_not_retried_for_ever(
    given: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}

    def start(**_: Any) -> None:
        environment.update(os.environ)

    monkeypatch.setattr(os, "environ", {**os.environ, **({"RAY_task_oom_retries": given} if given else {})})
    monkeypatch.setattr(cluster.ray, "init", start)
    cluster._connect(RayConfig())
    assert environment["RAY_task_oom_retries"] == told


def test_what_fails_and_nobody_waits_for_prints_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Data's actor that counts, killed for want of memory and started again, failed so every five seconds."""
    worker = cluster.ray_worker.Worker()
    monkeypatch.setattr(worker, "deserialize_objects", lambda *_: [RayError("of counts")])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cluster.ray, "init", lambda **_: worker.raise_errors([], []))
    cluster._connect(RayConfig())
    assert (caplog.messages, capsys.readouterr()) == ([], ("", ""))


def test_a_signal_while_ray_starts_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cluster.ray, "init", start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster._connect(RayConfig())
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup.\nLogs"), FileNotFoundError(2, "No such", "/gone")]
)
@pytest.mark.parametrize(("address", "words"), [(None, "busy"), (None, "RAY_TMPDIR"), ("head:6379", "RAY_AUTH_MODE")])
def test_whatever_keeps_ray_from_starting_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str | None, words: str
) -> None:
    def start(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", start)
    with pytest.raises(ClusterError, match=re.escape(str(error).splitlines()[0]) + "$") as caught:
        cluster._connect(RayConfig(address=address))
    assert words in caught.value.remedy


def test_a_folder_whose_path_is_too_long_for_sockets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        validate_socket_filepath(f"/{'d' * 100}/ray/session/sockets/plasma_store")

    monkeypatch.setattr(cluster.ray, "init", start)
    with pytest.raises(ClusterError, match="AF_UNIX path length cannot exceed 107 bytes: /ddd") as caught:
        cluster._connect(RayConfig())
    assert "shorter path" in caught.value.remedy


def test_where_warnings_are_errors_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agent imports what pydantic warns of, and a node without agent does not come up."""

    def start(**_: Any) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setenv("PYTHONWARNINGS", "default,error")
    with pytest.raises(ClusterError) as caught:
        cluster._connect(RayConfig())
    assert "PYTHONWARNINGS" in caught.value.remedy


def test_a_cluster_of_other_versions_is_told_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        check_version_info({"ray_version": "2.59.1", "python_version": "3.12.3"}, "10.0.0.7:6379")

    monkeypatch.setattr(cluster.ray, "init", start)
    ours = f"Ray {ray.__version__} on Python {platform.python_version()}"
    message = f"the cluster at head:6379 runs Ray 2.59.1 on Python 3.12.3, this process {ours}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:  # no night tries that again
        cluster._connect(RayConfig(address="head:6379"))
    assert "pipelines.adhoc" in caught.value.remedy


OOM = """2 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 10.0.0.7, ID: 68218436aa53) was 3.03GB used / 23.54GB limit (0.128642)
OOM kill reason: Memory usage 3251625984B exceeded threshold
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""

TOO_LARGE = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__()
vlmflow.errors.ModelMemoryError: pool embed: the model of embed does not fit in the memory of the GPU"""


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OutOfDiskError("Local disk is full"), ClusterError, "RAY_TMPDIR"),
        (ObjectStoreFullError("full"), ClusterError, "RAY_TMPDIR"),
        (NodeDiedError("node is gone"), ClusterError, "What was committed stays"),
        (OutOfMemoryError(OOM), ClusterError, "fewer max_actors"),
        (RayTaskError("f", "trace", WeightsError("absent", remedy="Fetch them.")), WeightsError, "Fetch them."),
        (RayActorError(error_msg=TOO_LARGE), ModelMemoryError, "a larger share of a GPU"),
    ],
)
def test_whatever_ray_raises_during_a_run_is_told_in_our_words(
    monkeypatch: pytest.MonkeyPatch, error: RayError, expected: type[VlmflowError], words: str
) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    monkeypatch.setattr(cluster.ray, "nodes", list)
    monkeypatch.setattr(cluster, "node_groups", tuple)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    with pytest.raises(expected) as caught, cluster.ray_cluster(RayConfig()):
        raise error
    assert words in caught.value.remedy


def test_what_a_constructor_raises_keeps_its_remedy() -> None:
    with pytest.raises(WeightsError) as raised, remedy_noted():
        raise WeightsError("weights: absent", remedy="Fetch them.")
    trace = "".join(format_exception(raised.value))
    told = faults.in_our_words(RayActorError(error_msg=f"The actor died because of an error.\n{trace}"))
    assert (type(told), str(told), told.remedy) == (WeightsError, "weights: absent", "Fetch them.")


class Ended(BaseException):
    """As Prefect ends a flow run that was cancelled, or has taken too long."""


def test_what_ends_a_run_by_a_signal_while_it_waits_for_ray_is_no_error_of_ray_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(*_: Any, **__: Any) -> None:
        raise SystemError("<cyfunction CoreWorker.wait> returned a result with an exception set") from Ended()

    monkeypatch.setattr(faults.ray, "wait", wait)
    with pytest.raises(Ended):
        faults.wait_for_one([])
    with pytest.raises(SystemError, match="of its own"), faults.told():
        raise SystemError("of its own")


IN_A_CONSTRUCTOR = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__()
(pid=7, ip=10.0.0.7, actor_id=01, repr=MapWorker(MapBatches(PoolWorker)))
  File "weights.py", line 1, in identify
vlmflow.errors.WeightsError: no folder /models/clip"""


NO_MODULE = (
    IN_A_CONSTRUCTOR.rpartition("\n")[0] + "\nvlmflow.errors.FamilyError: family shop:A: there is no module shop"
)
NOT_IMPORTED = IN_A_CONSTRUCTOR.rpartition("\n")[0] + "\nModuleNotFoundError: No module named 'open_clip'"


def of_a_task(cause: VlmflowError, node: str) -> RayError:
    """As Ray raises it."""
    error = RayTaskError("f", "Traceback (most recent call last):\n  File", cause, ip=node)
    raised: RayError = error.as_instanceof_cause()
    return raised


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (of_a_task(WeightsError("absent"), "10.0.0.7"), "on node 10.0.0.7: absent"),
        (RayActorError(error_msg=IN_A_CONSTRUCTOR), "on node 10.0.0.7: no folder /models/clip"),
        (
            RayActorError(error_msg=NOT_IMPORTED),
            "the cluster gave up: RayActorError: on node 10.0.0.7: ModuleNotFoundError: No module named 'open_clip'",
        ),
        (of_a_task(WeightsError("absent"), get_node_ip_address()), "absent"),
        (of_a_task(SourceError("listed twice"), "10.0.0.7"), "listed twice"),
        (
            OutOfMemoryError(OOM),
            "the memory of node 10.0.0.7 ran out: Ray killed what the run had there (3.03GB used / 23.54GB)",
        ),
    ],
)
def test_what_another_node_lacks_is_told_with_its_name(error: RayError, message: str) -> None:
    with pytest.raises(VlmflowError) as caught, faults.told():
        raise error
    assert str(caught.value) == message


def test_a_module_that_the_driver_alone_has_is_told_with_what_workers_need() -> None:
    with (
        pytest.raises(FamilyError, match=r"^on node 10\.0\.0\.7: family shop:A: there is no module shop") as caught,
        faults.told(),
    ):
        raise RayActorError(error_msg=NO_MODULE)
    assert "install it on every node" in caught.value.remedy


@pytest.mark.parametrize(("address", "told"), [(None, "local"), ("auto", "auto"), ("head:6379",) * 2])
def test_an_embedded_cluster_is_no_other_that_ray_finds(
    address: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS, or a `ray start` on this machine."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **given: options.update(given))
    cluster._connect(RayConfig(address=address))
    assert options["address"] == told


def test_in_a_job_of_a_cluster_no_embedded_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("it started"))
    with pytest.raises(ConfigError, match="job of a Ray cluster") as caught:  # no night tries that again
        cluster._connect(RayConfig())
    assert "--ray-address auto" in caught.value.remedy


class FakeRay:
    """Ray as far as connecting goes, which takes a while."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def init(self, **_: Any) -> None:
        assert not self.is_initialized(), "Ray's own error for a second call"
        time.sleep(0.05)
        self.calls.append("init")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def is_initialized(self) -> bool:
        return self.calls[-1:] == ["init"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("init", "shutdown", "is_initialized"):
        monkeypatch.setattr(cluster.ray, name, getattr(fake, name))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(cluster, "node_groups", tuple)
    return fake


def test_blocks_that_overlap_share_a_cluster_to_the_end_of_the_last(fake: FakeRay) -> None:
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.max_errored_blocks, list(logger.handlers), logger.propagate
    first, second = ExitStack(), ExitStack()
    found = [one.enter_context(cluster.ray_cluster(RayConfig())) for one in (first, second)]
    errors = second.enter_context(found[1].worker_errors())
    first.enter_context(found[0].worker_errors())
    with pytest.raises(ClusterError, match=r'ray: {}, and can have none of ray: {"num_cpus":1}'):
        first.enter_context(cluster.ray_cluster(RayConfig(num_cpus=1)))
    first.close()
    logger.error("a block", exc_info=ValueError("of one image"))
    assert errors.first() == "ValueError: of one image"
    assert [one.embedded for one in found] == [True, True]
    assert (context.max_errored_blocks, fake.calls) == (-1, ["init"])
    second.close()
    assert (context.max_errored_blocks, list(logger.handlers), logger.propagate) == before
    assert fake.calls == ["init", "shutdown"]
    with cluster.ray_cluster(RayConfig(num_cpus=1)):
        assert fake.calls[2:] == ["init"]


def test_threads_that_begin_at_once_start_one_cluster(fake: FakeRay) -> None:
    both = threading.Barrier(2, timeout=10)

    def work() -> None:
        both.wait()
        with cluster.ray_cluster(RayConfig()):
            both.wait()

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work) for _ in range(2)]:
            done.result()
    assert fake.calls == ["init", "shutdown"]


@pytest.mark.parametrize(("free", "told"), [(64e6, True), (4e9, False)])
def test_an_object_store_that_found_no_room_in_shared_memory_is_told_of(
    free: float, told: bool, fake: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0, "object_store_memory": 2e9})
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with cluster.ray_cluster(RayConfig()) as found:
        # What a run puts there takes of it, and makes no slow store of one that is in memory.
        monkeypatch.setattr(cluster.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
        with cluster.ray_cluster(RayConfig()) as found_later:
            assert found_later.slow_store == found.slow_store
        found.tell()
    assert ("/dev/shm has 0.06 GB free, and Ray's object store takes 2.0 GB. Give" in caplog.text) == told
    assert bool(caplog.messages) == told
    with cluster.ray_cluster(RayConfig(address="auto")) as found:
        assert found.slow_store == ""  # of its nodes nothing is known here


def test_what_nodes_say_is_logged_and_not_printed(
    fake: FakeRay, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Standard output is what a command gives, to machines with --json."""
    said = {"lines": ["Task f failed due to oom.\nand much more"], "pid": "raylet", "is_err": False}
    printing = cluster.ray_worker.print_to_stdstream
    with caplog.at_level(logging.INFO, "vlmflow"), cluster.ray_cluster(RayConfig()):
        cluster.ray_worker.print_to_stdstream(said, ignore_prefix=False)
        assert capsys.readouterr().out == ""
        of_worker = {"lines": ["printed by a worker"], "pid": 7, "is_err": False, "ip": "", "actor_name": None}
        cluster.ray_worker.print_to_stdstream(of_worker | {"task_name": None, "job": None}, ignore_prefix=True)
        assert capsys.readouterr().out == "printed by a worker\n"
    assert caplog.messages == ["Ray: Task f failed due to oom."]
    assert cluster.ray_worker.print_to_stdstream is printing


def test_ray_s_client_is_refused(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where RAY_ADDRESS or the caller has chosen it."""
    monkeypatch.setattr(cluster.client, "is_connected", fake.is_initialized)
    with pytest.raises(ConfigError, match="ray://") as caught, cluster.ray_cluster(RayConfig(address="auto")):
        pass
    assert "head:6379" in caught.value.remedy
    assert fake.calls == ["init", "shutdown"]


def test_a_cluster_of_the_callers_is_left_running(fake: FakeRay) -> None:
    fake.init()
    with cluster.ray_cluster(RayConfig()) as outer, cluster.ray_cluster(RayConfig(address="auto")) as inner:
        assert (outer.embedded, inner.embedded) == (False, False)
    assert fake.calls == ["init"]
