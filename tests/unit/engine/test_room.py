"""Runs that share a cluster: which of them begin, and that no two begin without room for both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from vlmflow.config import PoolConfig
from vlmflow.engine import room
from vlmflow.engine.cluster import Cluster
from vlmflow.engine.growth import NodeGroup
from vlmflow.engine.room import Entry, first_actors, fits, next_state

NODES = [(4.0, 2.0)]


def entry(came: int, *needs: tuple[float, float], **more: str) -> Entry:
    made = Entry(run_id=f"run-{came}", catalog=f"catalog-{came}", job="01000000", came=came, needs=needs)
    return replace(made, **more)  # type: ignore[arg-type]


def test_a_run_asks_for_the_actors_that_its_pools_begin_with() -> None:
    pools = [PoolConfig(tasks=("embed",), gpus=0.5, min_actors=2, max_actors=8), PoolConfig(tasks=("caption",), cpus=3)]
    assert first_actors(pools) == ((1, 0.5), (1, 0.5), (3, 0))


@pytest.mark.parametrize(
    ("nodes", "needs", "expected"),
    [
        ([(3, 0)], [(1, 0), (1, 0)], True),
        ([(2, 0)], [(1, 0), (1, 0)], False),  # no core for decoding
        ([(2.45, 0)], [(1, 0), (1, 0)], True),
        (
            [(2, 0), (2, 0)],
            [(1.5, 0), (1.5, 0), (1, 0)],
            False,
        ),  # one is free: half on each
        ([(2, 0), (2, 0)], [(1.5, 0), (1.5, 0)], True),
        ([(8, 2)], [(1, 0.6)] * 3, False),  # 1.8 of two GPUs, and 0.4 are free on each
        ([(8, 2)], [(1, 0.5)] * 4, True),
        ([(8, 2)], [(1, 0.3)] * 6, True),
        ([(8, 2)], [(1, 2), (1, 0)], True),
        ([(8, 2)], [(1, 0.1), (1, 2)], False),
        ([(8, 1), (8, 1)], [(1, 2)], False),
        ([(8, 1), (8, 1)], [(1, 1), (1, 1)], True),
        ([(4, 0), (4, 4)], [(4, 0), (1, 1)], True),  # not on the node with the GPUs
        ([(0.8, 0)], [(0.1, 0), (0.2, 0)], True),  # 0.1 + 0.2 + 0.45, of which none is exact
        ([(0.75, 0)], [(0.1, 0), (0.2, 0)], True),
        ([], [(1, 0)], False),
    ],
)
def test_room(nodes: list[tuple[float, float]], needs: list[tuple[float, float]], expected: bool) -> None:
    assert fits(nodes, tuple(needs)) is expected


def begun(mine: Entry, others: list[Entry]) -> Entry:
    """What becomes of a run that has all the time until it waits or has room."""
    while (then := next_state(mine, others, NODES)) != mine:
        mine = then
    return mine


def test_alone_a_run_begins_whatever_it_asks_for() -> None:
    assert begun(entry(1, (64.0, 8.0)), []).state == "has"  # the cluster may grow


def test_beside_others_it_begins_where_there_is_room_for_all() -> None:
    first = entry(1, (1.0, 1.0), state="has")
    assert begun(entry(2, (1.0, 1.0)), [first]).state == "has"
    assert begun(entry(2, (1.0, 1.0), (1.0, 1.0)), [first]).state == "waits"
    assert begun(entry(2, (2.6, 0.0)), [first]).state == "waits"


def test_nobody_overtakes_who_waits() -> None:
    first, large = entry(1, (1.0, 1.0), state="has"), entry(2, (1.0, 2.0))
    assert begun(entry(3, (0.1, 0.0)), [first, large]).state == "waits"
    assert begun(entry(3, (0.1, 0.0)), [first]).state == "has"


def test_of_two_that_claim_the_later_steps_back() -> None:
    early, late = entry(1, (1.0, 2.0), state="claims"), entry(2, (1.0, 2.0), state="claims")
    assert next_state(late, [early], NODES).state == "waits"
    assert next_state(early, [late], NODES) == early  # until that has been seen
    assert next_state(early, [replace(late, state="waits")], NODES).state == "has"


def run(came: int, needs: tuple[tuple[float, float], ...], store: dict[str, Entry], log: list[str]) -> Iterator[None]:
    """A run as :class:`vlmflow.engine.room.Room` takes it, that stops wherever others may come between."""
    mine = entry(came, *needs)
    store[mine.run_id] = mine
    yield
    while mine.state != "has":
        others = [other for other in store.values() if other.run_id != mine.run_id]
        yield
        then = next_state(mine, others, NODES)
        if then != mine:
            mine = store[mine.run_id] = then
        yield
    have = [other for other in store.values() if other.state == "has"]
    assert len(have) == 1 or fits(NODES, tuple(need for other in have for need in other.needs))
    for _ in range(random.Random(came).randrange(6)):
        yield
    log.append(mine.run_id)
    del store[mine.run_id]


@pytest.mark.parametrize("seed", range(300))
def test_however_they_come_and_end_all_get_their_turn_and_none_too_early(seed: int) -> None:
    choose = random.Random(seed)
    store: dict[str, Entry] = {}
    log: list[str] = []
    shapes = [((1.0, 1.0),), ((1.0, 1.0), (1.0, 1.0)), ((0.5, 0.5),), ((3.0, 0.0),), ((9.0, 0.0),)]
    # Clocks differ: a run may come later, and say that it came before.
    waiting = [run(came, choose.choice(shapes), store, log) for came in choose.sample(range(100), 6)]
    live: list[Iterator[None]] = []
    for _ in range(20_000):
        if waiting and choose.random() < 0.1:
            live.append(waiting.pop())
        if live:
            one = choose.choice(live)
            if next(one, "ended") == "ended":
                live.remove(one)
        if not live and not waiting:
            break
    assert len(log) == 6
    assert not store


def test_a_run_that_was_killed_while_it_claimed_is_in_nobodys_way_once_its_entry_is_gone() -> None:
    killed, late = entry(1, (1.0, 2.0), state="claims"), entry(2, (1.0, 2.0))
    assert begun(late, [killed]).state == "waits"
    assert begun(late, []).state == "has"


@pytest.mark.parametrize(
    ("there", "groups", "expected"),
    [
        ([(8, 1)], [], {(8, 1): 1}),
        ([(8, 1), (2, 0)], [((8, 1), 4), ((8, 1), 1), ((16, 0), 2)], {(8, 1): 5, (16, 0): 2, (2, 0): 1}),
        ([(8, 1)] * 3, [((8, 1), 2)], {(8, 1): 3}),
    ],
)
def test_nodes_are_those_that_are_there_or_may_be(
    monkeypatch: pytest.MonkeyPatch,
    there: list[tuple[float, float]],
    groups: list[tuple[tuple[float, float], int]],
    expected: dict[tuple[float, float], int],
) -> None:
    made = tuple(NodeGroup(cpus, gpus, 1.0, most) for (cpus, gpus), most in groups)
    monkeypatch.setattr(room, "nodes_now", lambda: tuple(there))
    found = room._nodes_of(Cluster(cpus=1.0, gpus=0.0, num_nodes=1, embedded=False, groups=made))
    assert Counter(found) == expected


def test_entries_of_runs_that_are_no_more_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a driver that Ray calls dead, and of a run of this process that could not remove its own."""
    store: dict[bytes, bytes] = {}
    monkeypatch.setattr(room, "_internal_kv_put", lambda key, value: store.update({key.encode(): value.encode()}))
    monkeypatch.setattr(
        room, "_internal_kv_list", lambda prefix: [key for key in store if key.startswith(prefix.encode())]
    )
    monkeypatch.setattr(room, "_internal_kv_get", lambda key: store.get(key))
    monkeypatch.setattr(room, "_internal_kv_del", lambda key: store.pop(key.encode()))
    jobs = [{"JobID": job, "IsDead": job == "dead"} for job in ("dead", "ours", "another")]
    monkeypatch.setattr(room.ray._private.state.state, "job_table", lambda: jobs)
    monkeypatch.setattr(room.ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "ours"))
    monkeypatch.setattr(room, "_here", {"run-2"})
    for came, job in enumerate(("dead", "ours", "ours", "another")):
        room._write(entry(came, (1.0, 0.5), job=job))
    assert room.runs_there() == [entry(2, (1.0, 0.5), job="ours"), entry(3, (1.0, 0.5), job="another")]
    assert len(store) == 2


def test_who_waits_says_for_whom() -> None:
    first, second, third = (entry(came, (1.0, 0.0)) for came in (1, 2, 3))
    behind = "waiting for its turn on the cluster behind run run-1 of catalog-1"
    assert room._sentence(third, [second, first]) == behind
    first, second = replace(first, state="has"), replace(second, state="has")
    has = "waiting for room on the cluster, which run run-1 of catalog-1 has"
    assert room._sentence(third, [first]) == has
    assert room._sentence(third, [second, first]) == f"{has} and 1 more"
