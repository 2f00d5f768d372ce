"""A head that is gone is told before Ray ends the process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from threading import Event, Thread, Timer
from types import SimpleNamespace

import pytest

from tests.processes import free_port, wait_for
from vlmflow.engine import cluster, faults, head, room
from vlmflow.engine.consume import FinishedBlocks
from vlmflow.errors import ClusterError


class Silent:
    """A dataset that waits for a cluster."""

    _create_executor = None

    def __init__(self) -> None:
        self.over = Event()

    def iter_internal_ref_bundles(self) -> list[object]:
        self.over.wait(60)
        return []


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a head that answers a few times, and no more."""
    monkeypatch.setattr(head, "_POLL_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with head.watched(address, 0.1):
            for _ in range(3):
                server.accept()[0].close()
            head.check_head()
            server.close()
            yield address
    head.check_head()  # of a connection that is over nobody is told


def test_who_waits_is_told_that_the_head_is_gone(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for(lambda: bool(caplog.messages), seconds=20)
    assert f"{address} has not answered" in caplog.text
    dataset = Silent()
    with FinishedBlocks(dataset) as finished:  # type: ignore[arg-type]
        with pytest.raises(ClusterError, match=f"{address} has not answered") as caught:
            finished.next(0.01)
        dataset.over.set()
    assert "stays" in caught.value.remedy
    monkeypatch.setattr(faults.ray, "wait", lambda refs, **_: ([], refs))
    with pytest.raises(ClusterError, match="has not answered"):
        faults.get(object())


def test_what_ends_then_asks_the_head_for_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer would come after the minute at whose end Ray ends the process."""
    asked: list[str] = []
    monkeypatch.setattr(room, "_internal_kv_del", asked.append)
    mine = room.Entry("run", "catalog", "job", 0, ())
    room._withdraw(mine)
    assert len(asked) == 1
    wait_for(lambda: bool(caplog.messages), seconds=20)
    room._withdraw(mine)
    assert len(asked) == 1
    dataset = Silent()
    with FinishedBlocks(dataset) as finished:  # type: ignore[arg-type]
        monkeypatch.setattr(finished, "_end", lambda: asked.append("end"))
    dataset.over.set()
    assert len(asked) == 1


@pytest.mark.parametrize(("died", "is_told"), [("raylet", True), ("gcs_server", True), ("log_monitor", False)])
def test_a_process_of_an_embedded_ray_that_was_killed_is_told_before_ray_ends_ours(
    died: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: list[tuple[str, object]] = []
    monkeypatch.setattr(head.ray_worker, "_global_node", SimpleNamespace(dead_processes=lambda: dead))
    looks: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = head._Watch(f"127.0.0.1:{server.getsockname()[1]}", 60.0)

        def wait(seconds: float) -> bool:
            looks.append(seconds)
            if len(looks) == 2:
                assert watch.lost is None
                dead.append((died, object()))
            return len(looks) > 3

        monkeypatch.setattr(watch.stop, "wait", wait)
        watch.run()
    told = "" if watch.lost is None else str(watch.lost)
    assert told == (f"a process of the embedded Ray has ended: {died}" if is_told else "")


def test_at_an_address_where_nobody_listens_nobody_waits_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_PATIENCE_S", 0.2)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match=f"^Ray at {address} does not answer: Connection refused$") as caught:
        cluster._await_head(address)
    assert "Check the address" in caught.value.remedy
    for impossible in ("127.0.0.1:99999", f"{'a' * 70}.test:1"):
        with pytest.raises(ClusterError, match=f"^Ray at {impossible} does not answer: "):
            cluster._await_head(impossible)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address):
        cluster._await_head("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    for left_to_ray in ("auto", "ray://127.0.0.1:1", "local"):
        cluster._await_head(left_to_ray)


def test_a_head_that_is_just_being_started_is_waited_for() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*server.getsockname())
        Timer(0.3, server.listen).start()
        cluster._await_head(address)


@pytest.mark.parametrize(
    ("answer", "is_head"),
    [
        (bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]), True),
        (b"", True),  # one that is busy may say nothing for long
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"-ERR unknown command\r\n", False),
    ],
)
def test_what_listens_and_is_no_head_is_told_at_once(answer: bytes, is_head: bool) -> None:
    """As the port of the dashboard: Ray waits for minutes there."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            server.accept()[0].close()  # who looks whether somebody listens
            with server.accept()[0] as asked:
                asked.recv(1024)
                asked.sendall(answer)

        thread = Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if is_head:
            cluster._await_head(address)
        else:
            with pytest.raises(ClusterError, match=f"{address} does not answer: what listens there is no head"):
                cluster._await_head(address)
        thread.join()
