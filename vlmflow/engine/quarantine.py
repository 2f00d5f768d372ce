"""Images that took their worker down: each is run alone, in a process that may die, and gets its row either way.

Ray Data gives up a block after three deaths of its worker, and the block's other images with it. Reconciling finds
them by key; here they are run one at a time, so that only the image that kills is recorded as failed.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from vlmflow.config import PoolConfig, QuarantineConfig, TaskName
from vlmflow.engine import columns, watchdog
from vlmflow.engine.decoding import PoolDecoding, ReadAndDecode
from vlmflow.engine.faults import in_our_words
from vlmflow.engine.pools import PoolWorker
from vlmflow.errors import ClusterError, RowErrorClass
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup

logger = logging.getLogger("vlmflow")

_START_TIMEOUT_S = 600.0  # loading the models of all pools


@dataclass(frozen=True)
class Stages:
    """What an image goes through: decoding, then the tasks of the pools in order.

    Attributes:
        sized_by_memory: the pools' batch sizes are defaults, of which an actor with a small GPU does less at once.
    """

    decode: ReadAndDecode
    pools: tuple[PoolConfig, ...]
    setup: TaskSetup
    prompts: PromptVectors | None
    sized_by_memory: bool = False

    @property
    def decoding(self) -> PoolDecoding:
        """What the first pool must know to decode what is left to it."""
        return PoolDecoding(self.decode.requests, self.decode.limits)

    @property
    def tasks(self) -> list[TaskName]:
        """The tasks, in the order in which they run."""
        return [task for pool in self.pools for task in pool.tasks]


class _Supervised:
    """The process that may die: runs one image at a time, in memory that is limited."""

    def __init__(self, stages: Stages, max_memory_bytes: int) -> None:
        watchdog.disable()  # the caller has the clock, and would take a process that ends itself for a crash
        # What took a pool down may have been its decoder: here processors decode all.
        self._decode = replace(stages.decode, leaves_jpegs=False)
        later = tuple(stages.tasks)
        self._workers: dict[str, PoolWorker] = {
            task: PoolWorker(pool.model_copy(update={"tasks": (task,)}), stages.setup, stages.prompts, later=later)
            for pool in stages.pools
            for task in pool.tasks
        }
        if not any(pool.gpus for pool in stages.pools):  # CUDA maps more than any sensible limit
            used = psutil.Process().memory_info().data
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (used + max_memory_bytes, hard))

    def ready(self) -> bool:
        """Answers once the models are loaded."""
        return True

    def decode(self, row: pa.Table) -> pa.Table:
        """Reads and decodes one image."""
        return self._decode(row)

    def run(self, task: str, row: pa.Table) -> pa.Table:
        """Runs one task on one image."""
        return self._workers[task](row)


class Quarantine:
    """Runs images alone under the supervision of this process."""

    def __init__(self, stages: Stages, config: QuarantineConfig) -> None:
        self._stages, self._config = stages, config
        self._remote = ray.remote(
            num_cpus=max(pool.cpus for pool in stages.pools),
            num_gpus=max(pool.gpus for pool in stages.pools),
            max_restarts=0,
            max_task_retries=0,
        )(_Supervised)
        self._actor: Any = None

    def run(self, row: pa.Table) -> pa.Table:
        """Takes one planned image through all stages.

        Returns:
            Its finished row. Where a stage killed the process, never returned or raised, the row says so.

        Raises:
            ClusterError: the process cannot be started.
            VlmflowError: an error of ours kept it from starting, as absent weights do.
        """
        decoded = self._call("decode", row)
        if isinstance(decoded, RowErrorClass):
            finished = self._stages.decode.failed(row, decoded, _MESSAGES[decoded])
            return _bare(finished)
        for task in self._stages.tasks:
            finished = self._call("run", task, decoded)  # a task reads what is there: null where one before it failed
            decoded = _failed_task(decoded, task, finished) if isinstance(finished, RowErrorClass) else finished
        return _bare(decoded)

    def close(self) -> None:
        """Ends the process."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _call(self, method: str, *arguments: Any) -> pa.Table | RowErrorClass:
        actor = self._started()
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=self._config.timeout_s)
        except GetTimeoutError:
            found = RowErrorClass.TIMED_OUT
        except OutOfMemoryError:
            found = RowErrorClass.OUT_OF_MEMORY
        except RayTaskError as error:
            logger.warning("an image fails alone: %s", str(error).strip().splitlines()[-1])
            return RowErrorClass.OUT_OF_MEMORY if isinstance(error.cause, MemoryError) else RowErrorClass.TASK_FAILED
        except RayActorError:
            found = RowErrorClass.WORKER_DIED
        except RayError as error:  # not of the image
            raise in_our_words(error) from error
        self.close()
        return found

    def _started(self) -> Any:
        if self._actor is None:
            self._actor = self._remote.remote(self._stages, self._config.max_memory_bytes)
            try:
                ray.get(self._actor.ready.remote(), timeout=_START_TIMEOUT_S)
            except GetTimeoutError as error:
                raise ClusterError(
                    f"the process that runs images alone was not ready within {_START_TIMEOUT_S:.0f} s",
                    remedy="What was committed stays. See that the cluster has room, then run the same command again.",
                ) from error
            except RayError as error:
                raise in_our_words(error) from error
        return self._actor


def _bare(row: pa.Table) -> pa.Table:
    """A finished row as the pipeline gives it. What ran alone is no pool of the run, and counts as none."""
    row = columns.drop_regions(columns.drop_views(columns.drop_pixels(row)))
    return row.drop_columns([name for name in row.column_names if name.startswith(columns.BATCHES_PREFIX)])


_MESSAGES = {
    RowErrorClass.TIMED_OUT: "did not finish alone within the time limit of the quarantine",
    RowErrorClass.OUT_OF_MEMORY: "exceeds the memory limit of the quarantine, alone",
    RowErrorClass.WORKER_DIED: "kills the process that works on it, alone",
    RowErrorClass.TASK_FAILED: "fails in a way that nothing else does; the log names it",
}


def _failed_task(row: pa.Table, task: str, error_class: RowErrorClass) -> pa.Table:
    """Records that a task failed on a row; what it would have written stays absent, which is null."""
    error = {"stage": task, "class": str(error_class), "message": _MESSAGES[error_class]}
    row = columns.append_to_lists(row, columns.TASKS_FAILED, [[task]])
    return columns.append_to_lists(row, "errors", [[error]])
