"""Metrics that cannot be told stop nothing; counters are told what has come since they were last told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from vlmflow.engine import metrics
from vlmflow.engine.collect import Collected
from vlmflow.engine.metrics import Metrics, RunMetrics
from vlmflow.engine.progress import Tally


class Recorded:
    """Stands for Ray's counters and gauges: remembers what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> Any:
        recorded = self

        class Made:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(tag_keys)
                recorded.told.append((name, value, tags))

            set = inc

        return Made()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "Counter", made)
    monkeypatch.setattr(metrics, "Gauge", made)
    return made


def test_a_counter_grows_by_what_is_new(recorded: Recorded) -> None:
    told = RunMetrics("s3://shop/catalog", ("embed",))
    collected = Collected(num_rows=3)
    collected.statuses.update({"ok": 3})

    told.update(Tally(total=10, done=5), collected, num_blocks=2)
    told.update(Tally(total=10, done=5), collected, num_blocks=2)
    collected.statuses.update({"ok": 4})
    told.update(Tally(total=10, done=10), collected)

    images = [value for name, value, _ in recorded.told if name == "vlmflow_images_total"]
    assert images == [3, 4]
    waiting = [
        (labels["waiting_for"], value) for name, value, labels in recorded.told if name == "vlmflow_queue_images"
    ]
    assert waiting[:2] == [("workers", 5), ("commit", 2)]
    assert [value for name, value, _ in recorded.told if name == "vlmflow_queue_blocks"] == [2, 2, 0]


def test_a_metric_that_cannot_be_told_is_logged_once_and_stops_nothing(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("the exporter is gone")

    monkeypatch.setattr(metrics, "Gauge", refuse)
    told = Metrics()

    with caplog.at_level(logging.WARNING, logger="vlmflow"):
        told.set("vlmflow_queue_blocks", 1, catalog="a")
        told.set("vlmflow_queue_blocks", 2, catalog="a")

    assert [record.getMessage() for record in caplog.records] == [
        "no more metrics from this process: vlmflow_queue_blocks: the exporter is gone"
    ]


def test_without_ray_nothing_is_told(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: False)

    Metrics().raise_to("vlmflow_retries_total", 1, kind="commit")

    assert recorded.told == []
