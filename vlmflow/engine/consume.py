"""Finished blocks as they come, consumed in a thread so that commits come on time while no block is ready."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from types import TracebackType
from typing import Self

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import RayError

from vlmflow.engine.faults import in_our_words
from vlmflow.engine.head import check_head, is_lost

# Blocks that wait for the driver hold memory in the object store; a few hide the time of a commit.
_MAX_WAITING = 64
_POLL_S = 0.2
_JOIN_S = 5.0
_SOON_S = 0.01
_THREAD = "vlmflow-consume"
_SILENCE_S = 300.0

logger = logging.getLogger("vlmflow")

Block = tuple["ray.ObjectRef[pa.Table]", int]  # a reference and the number of rows behind it


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.threadName != _THREAD


# What ends the thread below is told by `next`. Ray Data prints its trace as well, as a defect of its own: also of a run
# that was interrupted, whose thread still waits for a block when Ray stops.
logging.getLogger("ray.data.exceptions").addFilter(_is_of_others)


def _executors_of(dataset: Dataset, stop: threading.Event) -> list[StreamingExecutor]:
    """What will run the dataset, from when it starts: Ray Data gives it with the first block, for which it may wait."""
    create, executors = dataset._create_executor, []

    def created() -> StreamingExecutor:
        if stop.is_set():
            raise RuntimeError("the run has left before its pipeline began")
        executors.append(create())
        return executors[-1]

    dataset._create_executor = created
    return executors


class FinishedBlocks:
    """Runs a dataset; a context manager, with whose end all that runs for it ends."""

    def __init__(self, dataset: Dataset) -> None:
        self._queue: queue.Queue[list[Block] | BaseException | None] = queue.Queue(maxsize=_MAX_WAITING)
        self._stop = threading.Event()
        self._dataset, self._executors = dataset, _executors_of(dataset, self._stop)
        self._silent_since: float | None = time.monotonic()  # None: the user was told of this silence
        self._thread = threading.Thread(target=self._consume, name=_THREAD, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if is_lost():
            return
        # In a thread: a cluster whose head is gone does not answer, also before that is known.
        ending = threading.Thread(target=self._end, name="vlmflow-end", daemon=True)
        ending.start()
        for thread in (ending, self._thread):
            thread.join(timeout=_JOIN_S)

    @property
    def num_waiting(self) -> int:
        """How many times blocks have come that nobody has taken yet; the next may be on its way."""
        return self._queue.qsize()

    def next(self, timeout_s: float) -> list[Block] | None:
        """The next blocks; an empty list if none came in time, None if there will be no more.

        Raises:
            VlmflowError: an actor could not start, or the cluster went away.
        """
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            check_head()
            self._tell_of_silence()
            return []
        self._silent_since = time.monotonic()
        if isinstance(item, RayError):
            raise in_our_words(item) from item
        if isinstance(item, BaseException):
            raise item
        return item

    def _tell_of_silence(self) -> None:
        """Actors that were restarted on fewer nodes, or those of another run, may hold all that decoding waits for."""
        if self._silent_since is None or time.monotonic() - self._silent_since < _SILENCE_S:
            return
        self._silent_since = None
        logger.warning(
            "no image has come out of the pools for %.0f minutes. Models may be slow, or the run waits for processors "
            "that its actors or other runs hold, or for a node: `ray status` tells what the cluster has and waits for",
            _SILENCE_S / 60,
        )

    def _end(self) -> None:
        """Ends what still runs: where a run was given up, its actors would hold their part of the cluster.

        Without this they end with the next block, which may never come. And Ray, once stopped, ends the process of a
        thread that asks it for something, without a word: nobody would be told why the run ended.
        """
        until = time.monotonic() + _JOIN_S
        for executor in self._executors:
            while executor.ident is None and self._thread.is_alive() and time.monotonic() < until:
                time.sleep(_SOON_S)  # it is just about to be started, and has nothing to end before
            with contextlib.suppress(Exception):  # of a cluster that goes away at the same time
                executor.shutdown(force=False)  # of actors that are killed at a batch Ray prints that they were
            if executor.ident is not None:
                executor.join(_JOIN_S)

    def _consume(self) -> None:
        try:
            for bundle in self._dataset.iter_internal_ref_bundles():
                self._put([(entry.ref, entry.metadata.num_rows or 0) for entry in bundle.blocks])
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  raised in the driver's thread, by `next`
            self._put(error)
        else:
            self._put(None)

    def _put(self, item: list[Block] | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return
