"""CUDA streams by thread: what two threads of a worker give the device to do, it may do side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ThreadStreams:
    """A stream for each thread that asks, the same at every call; none where the device is not CUDA.

    On one stream for all, memory that one thread has given back, with its work on it still queued, would be another's
    at once.

    Args:
        priority: as CUDA counts, where -1 comes before 0: of the kernels that wait, those of the former start first.
    """

    def __init__(self, device: str, priority: int = 0) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._priority = priority
        self._threads = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[torch.cuda.Stream | None]:
        """Has this thread work on its stream, and waits for all of that work at the end."""
        if not self._is_cuda:
            yield None
            return
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(priority=self._priority)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._threads.stream
        with torch.cuda.stream(stream):
            yield stream
        stream.synchronize()
