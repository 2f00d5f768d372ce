"""The record of a run says how it ended."""

from __future__ import annotations

from asyncio import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.catalog_samples import open_catalog
from vlmflow.engine.run import _Run
from vlmflow.errors import UnreconciledError


class _Report(SimpleNamespace):
    def model_dump(self, mode: str) -> dict[str, Any]:
        return dict(vars(self))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (CancelledError(), "interrupted", "CancelledError"),  # as Prefect ends a flow run
        (ValueError("odd"), "failed", "odd"),
        (UnreconciledError("3 images"), "unreconciled", "3 images"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_run_that_was_stopped_is_told_from_one_that_failed(
    tmp_path: Path, error: BaseException, status: str, message: str
) -> None:
    catalog = open_catalog(tmp_path)
    run = _Run.__new__(_Run)
    finished = lambda status, message="": _Report(status=status, message=message)  # noqa: E731
    run.__dict__ |= {"_run_id": "r", "_report": finished("running"), "_finished": finished, "_verdicts_due": False}
    with pytest.raises(type(error)), run._recorded(catalog):
        raise error
    record = catalog.runs.get("r") or {}
    assert (record["status"], record["message"]) == (status, message)
