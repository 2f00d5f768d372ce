"""What a run spent its time on, in words."""

from __future__ import annotations

from vlmflow.engine.progress import duration
from vlmflow.engine.report import RunReport
from vlmflow.engine.stages import PoolReport, StageReport

_MIN_BUSY = 0.8  # share of its time from which a pool is what limits a run
_MIN_STARTUP = 0.5
_AT_DEVICE = "More or faster devices"
_AT_ENDPOINT = "More requests at once (endpoint.max_concurrency, max_actors), or an endpoint that answers sooner,"
_DOING = {"read": "reading the images", "decode": "decoding", "feed": "decoding in the pools"}


def what_limited(report: RunReport) -> str:
    """In a sentence or two, what the run spent its time on; empty where the record does not tell."""
    sentences = []
    if report.waited_s:
        sentences.append(
            f"Other runs: {duration(report.waited_s)} of {duration(report.seconds)} went by until the cluster had room "
            "for this one beside them."
        )
    if report.seconds and report.startup_s / report.seconds > _MIN_STARTUP:
        sentences.append(
            f"Start-up: {duration(report.startup_s)} of {duration(report.seconds)} went by before the first images "
            "were done (processes started, models loaded)."
        )
    pool = max(report.pools, key=_busy_share, default=None)
    if pool is None or not pool.busy_s:
        return " ".join(sentences)
    share = _busy_share(pool)
    stages = {stage.stage: stage for stage in report.stages}
    busy = {name: stage.busy_s for name, stage in stages.items()}
    then = "After that: " if sentences else ""
    if share >= _MIN_BUSY:
        slowest = max(pool.tasks, key=lambda task: busy.get(task, 0.0))
        sentences.append(
            f"{then}the models. Pool {'+'.join(pool.tasks)} was busy {share:.0%} of its time, most of it with "
            f"{slowest} ({duration(busy.get(slowest, 0.0))}{_of_ceiling(stages.get(slowest))}). "
            f"{_AT_ENDPOINT if slowest in report.usage else _AT_DEVICE} would make such a run shorter."
        )
    else:
        slower = max(_DOING, key=lambda stage: busy.get(stage, 0.0))
        doing = _DOING[slower]
        fed = f", and making batches ready in the pools {duration(busy['feed'])} of theirs" if "feed" in busy else ""
        sentences.append(
            f"{then}{doing}. The busiest pool, {'+'.join(pool.tasks)}, waited {1 - share:.0%} of its time for images; "
            f"reading took {duration(busy.get('read', 0.0))} and decoding {duration(busy.get('decode', 0.0))} of the "
            f"workers' time{fed}. More processors would make such a run shorter, or a store that answers sooner."
        )
    text = " ".join(sentences)
    return text[0].upper() + text[1:]


def _of_ceiling(stage: StageReport | None) -> str:
    """What its models reached of what the device can do, where that was measured."""
    if stage is None or stage.share_of_ceiling is None:
        return ""
    return f", at {stage.share_of_ceiling:.0%} of the device's measured matrix product"


def _busy_share(pool: PoolReport) -> float:
    return pool.busy_s / max(pool.busy_s + pool.waiting_s, 1e-9)
