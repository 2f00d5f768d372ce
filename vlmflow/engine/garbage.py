"""Python's garbage collector while a worker loads its libraries and models."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """Looks for garbage once, after the block; what is left then is not looked through again. Decorates as well.

    Importing torch, transformers and open_clip leaves some 850,000 objects, which the collector would look through
    again and again while they become more: a quarter of the time that it takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if was_enabled:
            gc.enable()
