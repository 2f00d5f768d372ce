"""The garbage collector while models are loaded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from vlmflow.engine.garbage import collected_once


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


def test_it_collects_at_the_end_alone_and_not_again() -> None:
    collections = []
    gc.callbacks.append(lambda phase, _: collections.append(phase))
    try:
        with collected_once():
            garbage = weakref.ref(Ring())
            kept = [Ring() for _ in range(gc.get_threshold()[0] * 2)]
            assert collections == []
            assert garbage() is not None
        assert collections == ["start", "stop"]
    finally:
        gc.callbacks.pop()
    assert garbage() is None
    assert gc.isenabled()
    assert not any(found is kept[0] for found in gc.get_objects())  # frozen


def test_a_model_that_does_not_load_leaves_it_on_and_a_caller_who_turned_it_off_has_it_off() -> None:
    def fail() -> None:
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        collected_once()(fail)()
    assert gc.isenabled()
    gc.disable()
    with collected_once():
        pass
    assert not gc.isenabled()
