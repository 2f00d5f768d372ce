"""Greedy decoding with a step whose shapes never change, so that CUDA can replay it as one graph."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch

from vlmflow.device_errors import capturing, is_device_broken, is_out_of_memory, release_on_demand
from vlmflow.models.blip_fast.cache import IndexedCache
from vlmflow.models.blip_fast.special import SpecialTokens
from vlmflow.models.blip_fast.text import TextTower
from vlmflow.models.sizes import is_watched, round_up

logger = logging.getLogger("vlmflow")

# The job's batches, and what is left of a stage's output; each graph holds the features of all its images.
_MAX_GRAPHS = 2
# Up to here graphs are for a power of two of images, then for multiples of this.
_STEP = 64
# Whether all captions have ended is asked so often, and read as many steps later, of which the device has some to do
# until then: a host that waits for the last one given would leave it idle, or its turn to other threads' kernels.
_STEPS_BETWEEN_CHECKS = 2
# As CUDA counts. A step has a hundred small kernels, each of which needs the one before. Among the kernels of vision
# towers every one would wait for its turn, and of all tasks captions take the longest as it is.
_PRIORITY = -1


class DecodeGraphs:
    """Graphs by batch size, captured when first needed."""

    def __init__(self, tower: TextTower, special: SpecialTokens) -> None:
        self._tower = tower
        self._special = special
        self._steps: dict[tuple[int, ...], FixedStep] = {}
        self._lock = threading.Lock()  # a step's memory holds one batch
        self._works = True
        # One for all: cuBLAS keeps a workspace of 32 MB for each stream that it was ever called on.
        self._stream: torch.cuda.Stream | None = None
        release_on_demand(self)

    def release(self) -> None:
        """Gives the memory of all graphs back; they are captured anew when needed. Any thread may call for it."""
        self._steps.clear()

    def decode(self, images: torch.Tensor, max_tokens: int) -> torch.Tensor | None:
        """As :class:`GreedyDecoder`, on CUDA; None: the step cannot be captured here, and is not tried again.

        Of several threads one at a time.
        """
        # A graph is replayed behind the back of whoever counts or traces operations.
        if is_watched():
            return None
        with self._lock:
            return self._decode(images, max_tokens) if self._works else None

    def _decode(self, images: torch.Tensor, max_tokens: int) -> torch.Tensor | None:
        key = self._key(images, max_tokens)
        try:
            step = self._steps.pop(key, None)
            if step is None:
                while len(oldest_first := list(self._steps)) >= _MAX_GRAPHS:
                    self._steps.pop(oldest_first[0], None)
                if images.is_cuda and self._stream is None:
                    self._stream = torch.cuda.Stream(priority=_PRIORITY)  # type: ignore[no-untyped-call]
                step = FixedStep(self._tower, self._special, images, key[0], max_tokens, self._stream)
                step.capture()
            self._steps[key] = step  # the last used at the end
            tokens = step.decode(images)
            # Another thread may have called for the memory of all graphs: it is free once this step is let go of.
            if tokens.is_cuda:
                torch.cuda.current_stream().synchronize()
            return tokens
        except RuntimeError as error:
            if is_out_of_memory(error) and self._stream is not None:
                # The step's memory goes back to the thread that made it, which knows nothing of replays under way.
                with contextlib.suppress(RuntimeError):  # of a broken device, which shows itself again
                    self._stream.synchronize()
            if is_out_of_memory(error) or is_device_broken(error):
                raise
            logger.warning("CUDA cannot capture a decoding step, which runs without a graph: %s", error)
            self._works = False
            self.release()
            return None

    def _key(self, images: torch.Tensor, max_tokens: int) -> tuple[int, ...]:
        """Of the smallest graph that is there and has at most twice the rows that are needed, else of a new one.

        Rows that nobody reads cost less than a capture.
        """
        num_rows, rest = round_up(len(images), _STEP), (*images.shape[1:], max_tokens)
        fitting = [key for key in list(self._steps) if key[1:] == rest and num_rows <= key[0] <= 2 * num_rows]
        return min(fitting, default=(num_rows, *rest))


class FixedStep:
    """One decoding step of ``num_rows`` images, on tensors that stay where they are."""

    def __init__(
        self,
        tower: TextTower,
        special: SpecialTokens,
        images: torch.Tensor,
        num_rows: int,
        max_tokens: int,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Makes room.

        Args:
            images: (N, T, D), for its shape, device and dtype; N at most ``num_rows``.
            stream: for the capture and all decoding; None: that of the calling thread, which can capture nothing.
        """
        self._tower = tower
        self._special = special
        self._max_tokens = max_tokens
        head_dim = tower.width // tower.num_heads
        self._images = images.new_zeros((num_rows, *images.shape[1:]))
        self._cache = IndexedCache(len(tower.layers), (num_rows, tower.num_heads, max_tokens, head_dim), images)
        device = images.device
        self._tokens = torch.empty((num_rows, 1), dtype=torch.int64, device=device)
        self._running = torch.empty(num_rows, dtype=torch.bool, device=device)
        self._decoded = torch.empty((num_rows, max_tokens), dtype=torch.int64, device=device)
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Records the step; CUDA alone."""
        with _on(self._stream):
            for _ in range(2):  # libraries set themselves up in the first calls, which no graph may record
                self._reset(0)
                self._step()
        self._reset(0)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # What fails leaves the thread on the stream that was captured: whoever goes on belongs on the one before.
        with torch.cuda.stream(torch.cuda.current_stream()), capturing:
            try:
                # Kernels keep the priority of the stream on which they are recorded, whatever that of a replay. Another
                # thread may be copying the next batch meanwhile, which would spoil a capture that watches all.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    self._step()
            except RuntimeError:
                # torch's allocator, which takes the capture for still going on, would free nothing any more.
                with contextlib.suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                raise
        self._graph = graph

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        """(N, T, D) -> (N, at most ``max_tokens``) token ids."""
        with _on(self._stream):
            done = self._fill(images)
        return self._decoded[: len(images), :done].clone()

    def _fill(self, images: torch.Tensor) -> int:
        """Decodes; how many steps it took."""
        self._images[: len(images)] = images
        self._reset(len(images))
        asked: _HaveEnded | None = None
        for done in range(1, self._max_tokens):
            self._next()
            if done % _STEPS_BETWEEN_CHECKS == 0:
                if asked is not None and asked.answer():
                    return done
                asked = _HaveEnded(self._running, self._stream)
        self._next()
        return self._max_tokens

    def _next(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _reset(self, num_images: int) -> None:
        self._cache.position.zero_()
        self._tokens.fill_(self._special.begin)
        self._decoded.fill_(self._special.pad)
        self._running.fill_(False)
        self._running[:num_images] = True

    def _step(self) -> None:
        best = self._tower.step(self._tokens, self._cache, self._images)[:, 0].argmax(dim=-1)
        best = best.masked_fill(~self._running, self._special.pad).unsqueeze(1)
        self._decoded.index_copy_(1, self._cache.position, best)
        self._running.logical_and_(best[:, 0] != self._special.end)
        self._tokens.copy_(best)
        self._cache.position.add_(1)


class _HaveEnded:
    """Whether all captions have ended, asked of the device now and read later."""

    def __init__(self, running: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """``running``: (N,) bool; ``stream``: None: there is nothing to wait for."""
        self._is_any = running.any().to("cpu", non_blocking=True)  # pinned, or the host would wait here
        self._told: torch.cuda.Event | None = None
        if stream is not None:
            # Waited for asleep: other threads want the core, and the device has steps to do meanwhile.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._told = stream.record_event(event)

    def answer(self) -> bool:
        if self._told is not None:
            self._told.synchronize()
        return not self._is_any


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Has this thread work on a stream, behind what it has given its own, which goes on behind that; None: on its
    own.
    """
    if stream is None:
        yield
        return
    own = torch.cuda.current_stream()
    stream.wait_stream(own)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # what failed too: memory of this thread's stream is still in use there
        own.wait_stream(stream)
