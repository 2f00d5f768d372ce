"""Graphs while another thread runs out of memory: a capture is waited for, and what is kept may go at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmflow.device_errors import release_memory
from vlmflow.models.blip_fast import graph
from vlmflow.models.blip_fast.graph import DecodeGraphs, FixedStep


class Device:
    """CUDA as far as captures and its allocator go, which fails as torch's does if memory is asked back meanwhile."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.num_emptied = 0
        self.is_capturing = False
        self.during_capture: Callable[[], None] = lambda: None

    def stream(self, priority: int) -> Any:
        self.streams.append(SimpleNamespace(wait_stream=lambda _: None, priority=priority))
        return self.streams[-1]

    @contextlib.contextmanager
    def capture(self, *_: object, **__: object) -> Iterator[None]:
        self.is_capturing = True
        self.during_capture()
        yield
        self.is_capturing = False

    def empty_cache(self) -> None:
        assert not self.is_capturing, "captures_underway.empty() INTERNAL ASSERT FAILED"
        self.num_emptied += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    for name, value in {
        "Stream": device.stream,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": object,
        "graph_pool_handle": object,
        "graph": device.capture,
        "is_initialized": lambda: True,
        "empty_cache": device.empty_cache,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def step_of(device: Device) -> FixedStep:
    step = FixedStep.__new__(FixedStep)
    step._stream = device.stream(0)
    step._reset = lambda _: None  # type: ignore[method-assign]
    step._step = lambda: None  # type: ignore[method-assign]
    return step


@pytest.mark.parametrize(
    ("ended_after", "max_tokens", "num_steps"), [(1, 20, 4), (4, 20, 6), (5, 20, 8), (5, 7, 7), (20, 20, 20), (1, 1, 1)]
)
def test_decoding_stops_soon_after_the_last_caption_has_ended(
    ended_after: int, max_tokens: int, num_steps: int
) -> None:
    step = FixedStep.__new__(FixedStep)
    step._stream, step._graph, step._max_tokens = None, None, max_tokens
    step._images, step._running = torch.zeros(4, 1, 2), torch.ones(4, dtype=torch.bool)
    step._decoded = torch.zeros((4, max_tokens), dtype=torch.int64)
    num_taken = 0

    def take() -> None:
        nonlocal num_taken
        num_taken += 1
        if num_taken == ended_after:
            step._running.fill_(False)

    step._reset = lambda _: None  # type: ignore[method-assign]
    step._step = take  # type: ignore[method-assign]
    assert step.decode(torch.ones(3, 1, 2)).shape == (3, num_steps)
    assert num_taken == num_steps


def test_memory_is_given_back_once_the_capture_is_done(device: Device) -> None:
    with ThreadPoolExecutor(1) as threads:
        given_back: list[Future[None]] = []

        def start() -> None:
            given_back.append(threads.submit(release_memory))
            assert wait(given_back, 0.2).not_done, "it waits"

        device.during_capture = start
        step_of(device).capture()
        given_back[0].result(20.0)
    assert device.num_emptied == 1


class Images:
    """Features of so many images on CUDA, as far as is asked."""

    is_cuda = True

    def __init__(self, num_images: int) -> None:
        self.shape = (num_images, 1, 4)

    def __len__(self) -> int:
        return self.shape[0]


def test_all_graphs_are_captured_and_replayed_on_one_stream_that_goes_first(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def make(*arguments: object) -> Any:
        given.append(arguments[-1])
        return SimpleNamespace(capture=lambda: None, decode=lambda _: SimpleNamespace(is_cuda=False))

    monkeypatch.setattr(graph, "FixedStep", make)
    graphs = DecodeGraphs(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    for num_images in (1, 8, 64):
        graphs.decode(Images(num_images), 4)  # type: ignore[arg-type]
    (stream,) = device.streams
    assert given == [stream] * 3
    assert stream.priority < 0


def test_a_failure_on_the_stream_is_waited_for_as_well(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or memory of the thread's own stream would be another's while decoding still reads it."""
    order: list[str] = []
    own = SimpleNamespace(wait_stream=lambda _: order.append("own waits"))
    stream: Any = SimpleNamespace(wait_stream=lambda _: order.append("stream waits"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: own)

    def fail() -> None:
        order.append("at work")
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"), graph._on(stream):
        fail()
    assert order == ["stream waits", "at work", "own waits"]


def test_replays_under_way_are_waited_for_where_memory_runs_out(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the step's memory would be given to another batch while they still write to it."""
    waited: list[str] = []

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph, "FixedStep", lambda *_: SimpleNamespace(capture=lambda: None, decode=fail))
    graphs = DecodeGraphs(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    graphs._stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        graphs.decode(Images(8), 4)  # type: ignore[arg-type]
    assert waited == ["stream"]


class Vanishing(dict[tuple[int, ...], Any]):
    """Steps that another thread lets go of whenever they are looked at."""

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for key in super().__iter__():
            self.clear()
            yield key

    def __len__(self) -> int:
        length = super().__len__()
        self.clear()
        return length


def test_graphs_may_be_let_go_while_one_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "FixedStep", lambda *_: SimpleNamespace(capture=lambda: None, decode=lambda x: x))
    graphs = DecodeGraphs(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    for num_images in (1, 2, 3):
        graphs._steps = Vanishing({(8, 1, 4): None, (16, 1, 4): None})
        images = torch.zeros(num_images, 1)
        assert graphs.decode(images, 4) is images
