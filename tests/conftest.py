"""Fixtures that all tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.s3 import S3Server, running_s3_server

# Collecting the tests imports all there is, and the collector would look through that again and again.
gc.disable()

# How long an example takes depends on what else runs here.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3-compatible server over HTTP, one for all tests: each takes a bucket of its own."""
    with running_s3_server() as server:
        yield server


def pytest_collection_finish() -> None:
    """From here on it looks through what tests make, not through what they import."""
    gc.freeze()
    gc.enable()


# Where two files run at a time, the longest must not be begun last.
_BEGIN_WITH = ("test_storage_faults.py", "test_enrich.py", "test_kill_enrich.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of :data:`_BEGIN_WITH` first, all else in its order."""
    rank = {name: number for number, name in enumerate(_BEGIN_WITH)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
