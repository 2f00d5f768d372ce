"""How often actors are killed while they load, as the cluster counts it."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from vlmflow.config import PoolConfig
from vlmflow.engine import loading, pools, starts
from vlmflow.engine.pools import PoolWorker
from vlmflow.engine.starts import MAX_KILLED, MAX_STARTS, Starts
from vlmflow.errors import ModelsKilledError


class Processes:
    """The process of one actor after the other, and what the cluster holds for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, str] = {}
        self._actor = ""
        monkeypatch.setattr(starts, "_internal_kv_get", self.held.get)
        monkeypatch.setattr(starts, "_internal_kv_list", lambda prefix: [k for k in self.held if k.startswith(prefix)])
        monkeypatch.setattr(starts, "_internal_kv_exists", self.held.__contains__)
        monkeypatch.setattr(starts, "_internal_kv_put", self.held.__setitem__)
        monkeypatch.setattr(starts, "_internal_kv_del", self.held.pop)
        context = SimpleNamespace(get_actor_id=lambda: self._actor)
        monkeypatch.setattr(starts, "ray", SimpleNamespace(get_runtime_context=lambda: context))

    def are_of(self, actor: str) -> None:
        self._actor = actor


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes(monkeypatch)
    found.are_of("a")
    return found


def test_one_that_was_killed_too_often_does_not_begin_again(processes: Processes) -> None:
    pool = Starts("embed")
    for _ in range(MAX_KILLED):
        pool.begin()
    Starts("embed").begin()  # of another pipeline
    with pytest.raises(ModelsKilledError, match=f"pool embed: .* killed {MAX_KILLED} times"):
        pool.begin()


def test_what_is_killed_at_work_has_loaded_and_begins_again(processes: Processes) -> None:
    pool = Starts("embed")
    for _ in range(2 * MAX_KILLED):
        pool.begin()
        pool.succeed()


def test_a_run_goes_on_with_the_actors_that_have_their_models(processes: Processes) -> None:
    pool = Starts("embed")
    pool.begin()
    pool.succeed()
    processes.are_of("b")
    for _ in range(2 * MAX_KILLED):
        pool.begin()


def test_a_run_waits_for_the_actors_that_may_still_get_their_models(processes: Processes) -> None:
    pool = Starts("embed")
    pool.begin()  # and loads for minutes
    processes.are_of("b")
    for _ in range(2 * MAX_KILLED):
        pool.begin()
    processes.are_of("a")
    for _ in range(MAX_KILLED - 1):
        pool.begin()
    processes.are_of("b")
    pool.begin()  # for the last start of the other is under way
    processes.are_of("a")
    with pytest.raises(ModelsKilledError, match="pool embed"):
        pool.begin()


def test_a_run_does_not_wait_for_ever_for_an_actor_that_never_starts_again(processes: Processes) -> None:
    pool = Starts("embed")
    pool.begin()  # its node was lost
    processes.are_of("b")
    for _ in range(MAX_STARTS):
        pool.begin()
    with pytest.raises(ModelsKilledError, match=f"killed {MAX_STARTS} times"):
        pool.begin()
    pool.succeed()  # another in the meantime
    pool.begin()


def test_a_worker_begins_before_its_models_and_succeeds_after_them(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_load: list[list[str]] = []

    def load(*_: object) -> SimpleNamespace:
        at_load.append(list(processes.held.values()))
        return SimpleNamespace(name="embed", reads=(), writes=pa.schema([]))

    monkeypatch.setattr(loading, "set_up_torch", lambda *_: "cpu")
    monkeypatch.setattr(loading, "check_weights", lambda *_: None)
    monkeypatch.setattr(pools, "load_task", load)
    setup = SimpleNamespace(requests_of=lambda _: [], read_regions=lambda _: False, dtype="auto")
    PoolWorker(PoolConfig(tasks=("embed",)), setup, None, starts=Starts("embed"))  # type: ignore[arg-type]
    assert at_load == [["1"]]
    assert [key.rpartition("-")[2] for key in processes.held] == ["loaded"]
