"""Where the time of a run went, stage by stage and pool by pool, from the sums over its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmflow.config import Frozen
from vlmflow.engine import columns

if TYPE_CHECKING:
    from vlmflow.engine.collect import Collected

_TERA = 1e12


class StageReport(Frozen):
    """Where the time of one stage went, summed over its workers.

    Attributes:
        stage: read, decode, feed, or a task. ``feed`` is what pools do beside their tasks: they put pixels on the
            device, and decode the JPEGs that were left to them.
        images: images that the stage worked on.
        busy_s: seconds of work, all workers together.
        images_per_busy_s: images per second of work of one worker.
        busy_share: of a task and of feed, its share of its pool's time between first and last batch; of read and
            decode, of all processors' time after the start-up, 1 at most: what was read ahead in it counts too. None:
            not known, or all of it fell into the start-up.
        waiting_share: of a task, the share of that time in which its pool waited for images.
        tflops_per_s: of a task, what its models computed while it was at work; None: not counted.
        share_of_ceiling: that over the speed of a plain product of large matrices, measured in the same workers.
    """

    stage: str
    images: int
    busy_s: float
    images_per_busy_s: float
    busy_share: float | None = None
    waiting_share: float | None = None
    tflops_per_s: float | None = None
    share_of_ceiling: float | None = None


class PoolReport(Frozen):
    """How a pool's actors spent their time between their first and their last batch.

    Attributes:
        busy_s: seconds in tasks, all actors together.
        waiting_s: seconds without a batch, all actors together.
        at_once: the most images at once since memory ran out, of the actor with the fewest; None: it never did.
        num_refused: JPEGs left to the actors' devices that went on to a processor, damaged or for want of memory.
    """

    tasks: tuple[str, ...]
    batches: int
    busy_s: float
    waiting_s: float
    at_once: int | None = None
    num_refused: int = 0


def stage_reports(tasks: tuple[str, ...], collected: Collected, cpu_s: float) -> tuple[StageReport, ...]:
    """The stages that did anything, in order.

    Args:
        cpu_s: seconds of all processors after the start-up; 0: not known, or no image was done in it.
    """
    sums, num_rows = collected.sums, collected.num_rows
    pool_of = {task: name for name in _pool_names(collected) for task in name.split("+")}
    fed_s = {name: sums[columns.seconds_column(f"feed:{name}")] for name in _pool_names(collected)}
    found = []
    for stage in ("read", "decode"):
        busy_s = sums[columns.seconds_column(stage)]
        share = round(min(1.0, busy_s / cpu_s), 4) if cpu_s > 0 else None
        found.append(_stage(stage, num_rows, busy_s).model_copy(update={"busy_share": share}))
    pools_s = sum(_pool_s(collected, name) for name in fed_s)
    share = round(min(1.0, sum(fed_s.values()) / pools_s), 4) if pools_s > 0 else None
    fed = _stage("feed", num_rows if fed_s else 0, sum(fed_s.values()))
    found.append(fed.model_copy(update={"busy_share": share}))
    for task in tasks:
        busy_s = sums[columns.seconds_column(task)]
        whole_s = _pool_s(collected, pool_of.get(task, ""))
        shares: dict[str, float] = {}
        if whole_s > 0:
            waiting_s = sums[columns.seconds_column(f"waiting:{pool_of[task]}")]
            shares = {"busy_share": round(busy_s / whole_s, 4), "waiting_share": round(waiting_s / whole_s, 4)}
        speed = _speed(collected, task, busy_s)
        found.append(_stage(task, collected.worked[task], busy_s).model_copy(update=shares | speed))
    return tuple(stage for stage in found if stage.busy_s or stage.images)


def pool_reports(collected: Collected) -> tuple[PoolReport, ...]:
    """The pools that did anything."""
    return tuple(
        PoolReport(
            tasks=tuple(name.split("+")),
            batches=round(collected.sums[columns.BATCHES_PREFIX + name]),
            busy_s=round(collected.sums[columns.seconds_column(f"busy:{name}")], 3),
            waiting_s=round(collected.sums[columns.seconds_column(f"waiting:{name}")], 3),
            at_once=collected.at_once.get(name),
            num_refused=round(collected.sums[columns.REFUSED_PREFIX + name]),
        )
        for name in _pool_names(collected)
    )


def _stage(stage: str, images: int, busy_s: float) -> StageReport:
    rate = round(images / busy_s, 2) if busy_s > 0 else 0.0
    return StageReport(stage=stage, images=images, busy_s=round(busy_s, 3), images_per_busy_s=rate)


def _speed(collected: Collected, task: str, busy_s: float) -> dict[str, float]:
    flops = collected.sums[columns.FLOPS_PREFIX + task]
    if not flops or busy_s <= 0:
        return {}
    ceiling = columns.CEILING_PREFIX + task
    speed = {"tflops_per_s": round(flops / busy_s / _TERA, 5)}
    if num_measured := collected.sums[columns.COUNT_PREFIX + ceiling]:
        mean = collected.sums[ceiling] / num_measured
        speed["share_of_ceiling"] = round(flops / busy_s / mean, 4)
    return speed


def _pool_s(collected: Collected, name: str) -> float:
    """Seconds of a pool's actors between their first and their last batch."""
    sums = collected.sums
    return sums[columns.seconds_column(f"busy:{name}")] + sums[columns.seconds_column(f"waiting:{name}")]


def _pool_names(collected: Collected) -> list[str]:
    names = (name for name in collected.sums if name.startswith(columns.BATCHES_PREFIX))
    return [name.removeprefix(columns.BATCHES_PREFIX) for name in names]
