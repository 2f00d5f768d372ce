"""The actor of a job takes turns between settings: what each is worth, in one run and on one machine.

A run for each setting (``benchmarks.changes``) pays for start-up every time, and two runs of one setting differ by some
hundredths. Here the settings change while the run goes on, for a few batches each, again and again, so that what drifts
drifts for all. A setting is one that a worker may change under way:

* ``one_at_captions``: one batch at captions, where two may be.
* ``more_at_once``: :data:`MORE_AT_ONCE` batches at once, where there are ``GPU_CALLS_AT_ONCE``.
* ``slow_switch``: a thread waits 5 ms for Python's interpreter, as it does unless told otherwise.
* ``ask_again``: threads that wait for the device ask again and again, where they sleep; CUDA alone.
* ``as_nice``: what decodes has the niceness of the actor that it decodes for; wants root.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa

from benchmarks.changes import Change, made
from benchmarks.job_profile import profile_for
from vlmflow.engine import pipeline
from vlmflow.engine.pools import PoolWorker

AS_IT_IS = "as_it_is"
MORE_AT_ONCE = 7
_AT_ONCE = pipeline.GPU_CALLS_AT_ONCE
_VARIABLE, _OPTIONS = "VLMFLOW_BENCHMARK_TURNS", "options.json"
_SLOW_SWITCH_S = 0.005
_NICEST = 19
_ASK, _SLEEP = 1, 4  # CU_CTX_SCHED_SPIN, CU_CTX_SCHED_BLOCKING_SYNC


@dataclass(frozen=True)
class Options:
    """How turns are taken.

    Attributes:
        settings: by name; :data:`AS_IT_IS` is always one, and the first.
        first: batches of an actor before the first turn: libraries set themselves up, operations are counted, graphs
            are captured, and reading ahead fills up. In the middle of them it is profiled.
        batches: of a turn.
        passed_over: of them, at its begin: they may have been begun before it.
        profile_s: seconds of the profile; 0: none is made.
    """

    settings: Sequence[str]
    first: int = 40
    batches: int = 18
    passed_over: int = MORE_AT_ONCE
    profile_s: float = 4.0

    def __post_init__(self) -> None:
        if unknown := set(self.settings) - SETTINGS.keys():
            raise ValueError(f"no settings: {', '.join(sorted(unknown))}; known: {', '.join(SETTINGS)}")


@contextlib.contextmanager
def taking_turns(folder: Path, options: Options) -> Iterator[None]:
    """Has the workers of clusters that start meanwhile take turns, and write to a folder what :func:`rates` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _OPTIONS).write_text(json.dumps(asdict(options)), encoding="utf-8")
    with (
        mock.patch.dict(os.environ, {_VARIABLE: str(folder.absolute())}),
        mock.patch.object(pipeline, "GPU_CALLS_AT_ONCE", MORE_AT_ONCE),  # an actor has a gate of its own
        made(Change.parse(f"{__name__}:install")),
    ):
        yield


def rates(folder: Path) -> dict[str, dict[str, Any]]:
    """Images per second by setting: of an actor, over all its turns, and of each of them."""
    passed_over = _read_options(folder).passed_over
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for _, turn in itertools.groupby(lines, key=lambda line: (line["turn"], line["setting"])):
            batches = list(turn)[passed_over:]
            if len(batches) > 1 and batches[0]["turn"] and batches[0]["setting"] is not None:
                rows = sum(batch["rows"] for batch in batches[1:])
                found[batches[0]["setting"]].append((rows, batches[-1]["at_s"] - batches[0]["at_s"]))
    return {
        setting: {
            "images_per_s": round(sum(rows for rows, _ in turns) / sum(seconds for _, seconds in turns), 1),
            "by_turn": [round(rows / seconds, 1) for rows, seconds in turns],
        }
        for setting, turns in found.items()
    }


def _read_options(folder: Path) -> Options:
    return Options(**json.loads((folder / _OPTIONS).read_text(encoding="utf-8")))


def install() -> None:
    """Has the pool of this process take turns: what a worker does before all else."""
    folder = Path(os.environ[_VARIABLE])
    options = _read_options(folder)
    run, lock, made_for = PoolWorker.__call__, threading.Lock(), dict[int, Turns]()

    def run_in_turn(worker: PoolWorker, batch: pa.Table) -> pa.Table:
        with lock:
            turns = made_for.get(id(worker)) or made_for.setdefault(id(worker), Turns(worker, folder, options))
        with turns.batch(batch.num_rows):
            return run(worker, batch)

    PoolWorker.__call__ = run_in_turn  # type: ignore[method-assign]


class Turns:
    """Those of one worker.

    Attributes:
        gate: of all its batches.
    """

    def __init__(self, worker: PoolWorker, folder: Path, options: Options) -> None:
        self.gate = threading.Semaphore(MORE_AT_ONCE)
        self._worker, self._folder, self._options = worker, folder, options
        self._settings = itertools.cycle(dict.fromkeys([AS_IT_IS, *options.settings]))
        self._lock = threading.Lock()
        self._setting: str | None = AS_IT_IS  # None: it is being changed, or could not be
        self._turn = self._num_done = 0
        self._changes = contextlib.ExitStack()
        self._changes.enter_context(_as_it_is(self))

    @contextlib.contextmanager
    def batch(self, num_rows: int) -> Iterator[None]:
        """One at work; noted when it is done."""
        with self.gate:
            yield
        with self._lock:
            self._num_done = done = self._num_done + 1
            self._write({"setting": self._setting, "turn": self._turn, "rows": num_rows, "at_s": time.time()})
        if done == self._options.first // 2 and self._options.profile_s:
            _aside(lambda: profile_for(self._options.profile_s, self._folder))
        if done >= self._options.first and (done - self._options.first) % self._options.batches == 0:
            _aside(self._change)  # it waits for batches that are under way

    def held(self, gate: threading.Semaphore, count: int) -> contextlib.ExitStack:
        """So many places of a gate, which batches do not get meanwhile."""
        with contextlib.ExitStack() as places:
            for _ in range(count):
                places.enter_context(gate)
            return places.pop_all()

    def slots(self, task: str) -> threading.Semaphore:
        """Of the batches that a task may be at."""
        return self._worker._turns._slots[task]

    def _change(self) -> None:
        setting, self._setting = next(self._settings), None
        self._changes.close()
        self._changes.enter_context(SETTINGS[setting](self))
        with self._lock:
            self._setting, self._turn = setting, self._turn + 1

    def _write(self, line: Mapping[str, object]) -> None:
        with (self._folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")


def _aside(call: Callable[[], None]) -> None:
    threading.Thread(target=call, daemon=True).start()


@contextlib.contextmanager
def _as_it_is(turns: Turns) -> Iterator[None]:
    with turns.held(turns.gate, MORE_AT_ONCE - _AT_ONCE):
        yield


@contextlib.contextmanager
def _more_at_once(_: Turns) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _one_at_captions(turns: Turns) -> Iterator[None]:
    with _as_it_is(turns), turns.held(turns.slots("caption"), 1):
        yield


@contextlib.contextmanager
def _slow_switch(turns: Turns) -> Iterator[None]:
    before = sys.getswitchinterval()
    with _as_it_is(turns):
        sys.setswitchinterval(_SLOW_SWITCH_S)
        yield
    sys.setswitchinterval(before)


@contextlib.contextmanager
def _ask_again(turns: Turns) -> Iterator[None]:
    with _as_it_is(turns):
        _let_wait(_ASK)
        yield
    _let_wait(_SLEEP)


def _let_wait(flags: int) -> None:
    """How threads wait for the device, from now on (CUDA driver API 12.1, cuCtxSetFlags)."""
    import torch

    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()  # gives this thread the context
    code = ctypes.CDLL("libcuda.so.1").cuCtxSetFlags(flags)
    if code:
        print(f"cuCtxSetFlags({flags}) gave {code}: threads wait as before", file=sys.stderr)


@contextlib.contextmanager
def _as_nice(turns: Turns) -> Iterator[None]:
    mine = os.nice(0)
    with _as_it_is(turns):
        decoding = [one for one in psutil.process_iter() if _niceness(one) > mine]
        _renice(decoding, mine)
        yield
    _renice(decoding, _NICEST)


def _niceness(process: psutil.Process) -> int:
    try:
        is_worker = process.cmdline()[:1] and process.cmdline()[0].startswith("ray::")
        return process.nice() if is_worker else -_NICEST
    except psutil.Error:
        return -_NICEST


def _renice(processes: Sequence[psutil.Process], niceness: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in process.threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, niceness)


SETTINGS: dict[str, Callable[[Turns], contextlib.AbstractContextManager[None]]] = {
    AS_IT_IS: _as_it_is,
    "one_at_captions": _one_at_captions,
    "more_at_once": _more_at_once,
    "slow_switch": _slow_switch,
    "ask_again": _ask_again,
    "as_nice": _as_nice,
}
