"""Room for a run on a cluster that others are at work on.

A run gets on with an actor of each of its pools and a core for decoding, and keeps its first actors until it ends. Of
two runs that have begun without room for both, each waits for what the other has, without end. So a run begins where
there is room for the first actors of all that are at work and for its own; the others wait, in the order they came.

Who is there stands in the cluster's store of keys and values, where each run writes one entry of its own and reads
those of the others. A run that claims room looks once more before it has it: of two that claim at once, at least one
sees the other. What is left of a run that was killed is told by Ray, which knows the drivers that live.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from vlmflow.config import PoolConfig
from vlmflow.engine.cluster import Cluster, nodes_now
from vlmflow.engine.faults import told
from vlmflow.engine.head import check_head, is_lost
from vlmflow.engine.pipeline import DECODE_CPUS

_PREFIX = "vlmflow-room-1-"  # of this form of entries
_POLL_S = 1.0
_EXACT = 1e-6  # Ray counts in ten-thousandths

_here: set[str] = set()  # runs of this process that have an entry

Needs = tuple[tuple[float, float], ...]  # CPUs and GPUs of each actor

logger = logging.getLogger("vlmflow")


@dataclass(frozen=True)
class Entry:
    """A run that is on the cluster, or wants to be.

    Attributes:
        job: of Ray: the driver.
        came: nanoseconds; by the clock of its own machine, so the order is about that of coming.
        needs: of the actors that it begins with.
    """

    run_id: str
    catalog: str
    job: str
    came: int
    needs: Needs
    state: Literal["waits", "claims", "has"] = "waits"

    @property
    def order(self) -> tuple[int, str]:
        """By which runs take turns; no two have the same."""
        return self.came, self.run_id


def first_actors(pools: Iterable[PoolConfig]) -> Needs:
    """What the actors ask for that pools begin with."""
    return tuple((pool.cpus, pool.gpus) for pool in pools for _ in range(pool.min_actors))


def fits(nodes: Sequence[tuple[float, float]], needs: Needs) -> bool:
    """Whether nodes bear such actors, and decoding beside them.

    The large ones are placed first, each on the least node that has room. There may be room that this does not find.

    Args:
        nodes: CPUs and GPUs of each.
    """
    cpus = [node[0] for node in sorted(nodes, key=lambda node: (node[1], node[0]))]
    gpus = [[1.0] * int(node[1]) for node in sorted(nodes, key=lambda node: (node[1], node[0]))]
    for wanted_cpus, wanted_gpus in sorted((*needs, (DECODE_CPUS, 0.0)), key=lambda need: need[::-1], reverse=True):
        for number, free in enumerate(cpus):
            taken = _take(gpus[number], wanted_gpus) if free + _EXACT >= wanted_cpus else None
            if taken is not None:
                cpus[number], gpus[number] = free - wanted_cpus, taken
                break
        else:
            return False
    return True


def _take(gpus: list[float], wanted: float) -> list[float] | None:
    """What is left of a node's GPUs; None: they do not bear it. A part of a GPU is on one, more are whole ones."""
    left = sorted(gpus)
    if wanted < 1:
        number = next((number for number, free in enumerate(left) if free + _EXACT >= wanted), None)
        if number is None:
            return None if wanted else left
        left[number] -= wanted
        return left
    num_whole = sum(free + _EXACT >= 1 for free in left)
    return left[: len(left) - int(wanted)] if num_whole >= wanted else None


def next_state(mine: Entry, others: Sequence[Entry], nodes: Sequence[tuple[float, float]]) -> Entry:
    """What becomes of a run's entry, given those that it reads after it has written its own.

    Args:
        others: of the runs that live.
        nodes: CPUs and GPUs of each node that the cluster has or may have.
    """
    before = [other for other in others if other.order < mine.order]
    have = [other for other in others if other.state == "has"]
    has_room = not have or fits(nodes, tuple(need for entry in (*have, mine) for need in entry.needs))
    if mine.state == "waits":
        may_claim = has_room and all(other.state == "has" for other in before)
        return replace(mine, state="claims") if may_claim else mine
    if mine.state == "claims":
        if not has_room or any(other.state == "claims" for other in before):
            return replace(mine, state="waits")
        # Those behind step back once they have seen this claim; until then they may take it for one that waits.
        is_alone = all(other.state != "claims" for other in others)
        return replace(mine, state="has") if is_alone else mine
    return mine


class Room:
    """The room of a run.

    Attributes:
        waited_s: how long it took until there was some.
    """

    def __init__(self, run_id: str, catalog: str, show: Callable[[str], None]) -> None:
        """Of a run.

        Args:
            show: what is waited for.
        """
        self._run_id, self._catalog, self._show = run_id, catalog, show
        self.waited_s = 0.0

    @contextlib.contextmanager
    def taken(self, pools: Iterable[PoolConfig], cluster: Cluster) -> Iterator[bool]:
        """Has room for the block; waits for it first, and tells whether it had to.

        Raises:
            ClusterError: the head of the cluster is gone.
        """
        job = ray.get_runtime_context().get_job_id()
        mine = Entry(self._run_id, self._catalog, job, time.time_ns(), first_actors(pools))
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(_withdraw, mine)
            stack.callback(_here.discard, mine.run_id)
            _here.add(mine.run_id)
            with told(), _Demand(cluster, mine.needs) as demand:
                has_waited = self._wait(mine, cluster, demand)
            if has_waited:
                self.waited_s = time.monotonic() - started
            yield has_waited

    def _wait(self, mine: Entry, cluster: Cluster, demand: _Demand) -> bool:
        """Whether there was something to wait for."""
        has_waited, shown = False, ""
        _write(mine)
        while mine.state != "has":
            check_head()
            others, before = [other for other in runs_there() if other.run_id != mine.run_id], mine
            mine = next_state(mine, others, _nodes_of(cluster))
            if mine != before:
                _write(mine)
                continue
            has_waited = True
            if (sentence := _sentence(mine, others)) != shown:
                shown = sentence
                self._show(sentence)
            demand.ask(is_next=all(other.state == "has" for other in others if other.order < mine.order))
            time.sleep(_POLL_S)
        return has_waited


class _Demand:
    """Has a cluster grow for a run that waits, where nobody knows what that may grow to.

    Ray is asked to place all of its first actors or none. Where it has placed them, that is let go again: the run has
    no room as long as others may still want theirs.
    """

    def __init__(self, cluster: Cluster, needs: Needs) -> None:
        self._may_grow = not cluster.embedded and not cluster.groups
        self._bundles = [{"CPU": cpus} | ({"GPU": gpus} if gpus else {}) for cpus, gpus in (*needs, (DECODE_CPUS, 0.0))]
        self._group: PlacementGroup | None = None

    def ask(self, *, is_next: bool) -> None:
        """Asks for nodes while the run is the next to begin."""
        if self._group is not None and (not is_next or self._group.wait(0)):
            self._let_go()
        elif self._group is None and is_next and self._may_grow:
            self._group = placement_group(self._bundles)

    def _let_go(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def __enter__(self) -> _Demand:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()


def _nodes_of(cluster: Cluster) -> list[tuple[float, float]]:
    """CPUs and GPUs of each node that there is or, where that is known, may be."""
    there, most = Counter(nodes_now()), Counter[tuple[float, float]]()
    for group in cluster.groups:
        most[group.cpus, group.gpus] += group.max_nodes
    return list((there | most).elements())  # of each kind the larger number


def _write(entry: Entry) -> None:
    _internal_kv_put(_PREFIX + entry.run_id, json.dumps(asdict(entry)))


def _withdraw(entry: Entry) -> None:
    if is_lost():
        return
    with contextlib.suppress(Exception):  # of a cluster that is gone; one that is there sees the driver end
        _internal_kv_del(_PREFIX + entry.run_id)


def runs_there() -> list[Entry]:
    """The runs on the cluster, in their order; entries of drivers that are dead are removed."""
    found = [_read(key) for key in _internal_kv_list(_PREFIX)]
    entries = sorted((entry for entry in found if entry is not None), key=lambda entry: entry.order)
    ours = ray.get_runtime_context().get_job_id()
    dead = {job["JobID"] for job in ray._private.state.state.job_table() if job["IsDead"]}
    # Of a run that ended while the head did not answer, the entry stayed.
    left = [entry for entry in entries if entry.job in dead or (entry.job == ours and entry.run_id not in _here)]
    for entry in left:
        _withdraw(entry)
    return [entry for entry in entries if entry not in left]


def _read(key: bytes) -> Entry | None:
    """None: it ended meanwhile."""
    value = _internal_kv_get(key)
    if value is None:
        return None
    given = json.loads(value)
    return Entry(**given | {"needs": tuple((cpus, gpus) for cpus, gpus in given["needs"])})


def _sentence(mine: Entry, others: Sequence[Entry]) -> str:
    """Of a run that waits, for those that have room or, where none has, for its turn."""
    have = [other for other in others if other.state == "has"]
    if not have:
        first = min(others, key=lambda other: other.order, default=mine)
        return f"waiting for its turn on the cluster behind run {first.run_id} of {first.catalog}"
    first = min(have, key=lambda other: other.order)
    more = f" and {len(have) - 1:,} more" if len(have) > 1 else ""
    return f"waiting for room on the cluster, which run {first.run_id} of {first.catalog} has{more}"
