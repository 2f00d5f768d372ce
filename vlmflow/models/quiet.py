"""Loading without the bar that transformers draws on standard error for every model of every worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.utils.logging


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keeps the bar away while the block runs."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
