"""What ends the thread that takes finished blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray.data.exceptions import omit_traceback_stdout

from vlmflow.engine.consume import FinishedBlocks


class Stopped:
    """A dataset under which Ray was stopped."""

    @omit_traceback_stdout
    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        raise RuntimeError("Ray has not been started yet")


@pytest.fixture
def printed() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.data")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_it_is_raised_and_not_printed_as_well(printed: list[str]) -> None:
    with FinishedBlocks(Stopped()) as finished, pytest.raises(RuntimeError, match="not been started"):  # type: ignore[arg-type]
        finished.next(60)
    assert printed == []
    with pytest.raises(RuntimeError):  # of everybody else Ray Data says it
        Stopped().iter_internal_ref_bundles()
    assert any("Full stack trace" in message for message in printed)
