"""Ctrl-C and SIGTERM while a store is silent: nobody waits until its client has given up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import obstore
import pytest

from tests.s3 import CREDENTIALS
from tests.terminal import run
from vlmflow.config import StorageConfig
from vlmflow.retry import retried
from vlmflow.sources.listing import list_objects
from vlmflow.sources.stores import Stores
from vlmflow.storage import open_store
from vlmflow.threads import Threads, check_can_start

CLIENT_GIVES_UP_S = 20.0


class Silent:
    """A server that takes connections and says nothing."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._taken: list[socket.socket] = []

    def wait_for_call(self) -> None:
        self._taken.append(self._socket.accept()[0])
        self._taken[-1].recv(1)

    def close(self) -> None:
        for taken in [*self._taken, self._socket]:
            taken.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = Silent()
    yield server
    server.close()


def storage_of(server: Silent) -> StorageConfig:
    endpoint = f"http://127.0.0.1:{server.port}"
    return StorageConfig(endpoint=endpoint, region="us-east-1", timeout_s=CLIENT_GIVES_UP_S, max_retries=0)


def head(storage: StorageConfig) -> None:
    store, _ = open_store("s3://bucket", storage)
    retried(lambda: obstore.head(store, "a.jpg"))


def first_page(storage: StorageConfig) -> None:
    next(list_objects("s3://bucket/images", Stores(storage), None))


def heads(storage: StorageConfig) -> None:
    Stores(storage).heads(["s3://bucket/a.jpg"])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, as in a terminal: workers of a test run ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("ask", [head, first_page, heads])
def test_an_interrupt_ends_the_wait_for_a_silent_store(ask: Callable[[StorageConfig], None], silent: Silent) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        silent.wait_for_call()
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(storage_of(silent))
    assert time.monotonic() - began < CLIENT_GIVES_UP_S / 2


def test_a_command_that_is_told_to_end_while_a_store_is_silent_ends(silent: Silent, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    storage = storage_of(silent).model_dump_json()
    job.write_text(
        f"{{source: {{uri: 's3://bucket/images/', storage: {storage}}}, catalog: {{uri: {tmp_path}/catalog}}, "
        "profile: starter, tasks: [embed]}"
    )
    command = [sys.executable, "-m", "vlmflow", "plan", "--config", str(job)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as plan:
        silent.wait_for_call()
        began = time.monotonic()
        os.kill(plan.pid, signal.SIGTERM)
        _, errors = plan.communicate(timeout=60)
    assert plan.returncode == 130, errors
    assert time.monotonic() - began < CLIENT_GIVES_UP_S / 2


def test_threads_answer_in_order_and_are_waited_for() -> None:
    done = []
    with Threads(2) as threads:
        assert list(threads.map(lambda number: number * 2, range(20))) == [number * 2 for number in range(20)]
        threads.submit(lambda: (time.sleep(0.05), done.append(1)))
        failed = threads.submit(partial(int, "x"))
    assert done == [1]
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result()


def test_threads_are_not_waited_for_by_an_interrupt_and_begin_nothing_after_it() -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def call() -> None:
        begun.release()
        release.wait(10)

    with contextlib.suppress(KeyboardInterrupt), Threads(2) as threads:
        for _ in range(5):
            threads.submit(call)
        begun.acquire()
        begun.acquire()
        raise KeyboardInterrupt
    release.set()
    assert not begun.acquire(timeout=0.1)


def test_too_few_threads_are_told_before_a_library_waits_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of ``ulimit -u 20``: commands hung in Rust, ended in a panic of it or in a traceback of Arrow."""
    start, left, before = threading.Thread.start, iter(range(19)), threading.active_count()

    def limited(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    check_can_start()
    monkeypatch.setattr(threading.Thread, "start", limited)
    assert run("policy", "list") == 2
    assert "no more threads - Allow more: `ulimit -u`" in capsys.readouterr().err
    assert threading.active_count() == before
