"""Tiny models gain nothing from threads, and lose a lot to them where the tests share the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dual_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, which nobody may write to."""
    from tests.dual_encoders import KINDS, make_dual_encoder

    root = tmp_path_factory.mktemp("dual")
    return {kind: make_dual_encoder(root / kind, kind) for kind in KINDS}
