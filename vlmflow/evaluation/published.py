"""Published figures of the same benchmark, to stand beside ours: ``published.yaml`` holds them with their sources."""

from __future__ import annotations

from functools import cache
from importlib import resources

import yaml

from vlmflow.evaluation.report import PublishedRow


def published(benchmark: str | None, task: str) -> tuple[PublishedRow, ...]:
    """What papers report on a benchmark and task, as shares; empty where nothing is known."""
    return () if benchmark is None else _all().get(f"{benchmark}/{task}", ())


@cache
def _all() -> dict[str, tuple[PublishedRow, ...]]:
    text = (resources.files("vlmflow.evaluation") / "published.yaml").read_text(encoding="utf-8")
    return {
        name: tuple(
            PublishedRow(**row | {"figures": {key: value / 100 for key, value in row["figures"].items()}})
            for row in rows
        )
        for name, rows in yaml.safe_load(text).items()
    }
