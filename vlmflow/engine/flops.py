"""How near a pool's models come to what the device can do: operations counted, and the ceiling measured, in the worker.

Counted are multiplications and additions of matrix products, attention and convolutions, two to a product, as torch's
counter does; what it knows no formula for counts nothing, so that shares are rather too small than too large.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pyarrow as pa
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from vlmflow.config import Dtype
from vlmflow.device_errors import is_device_broken, is_out_of_memory
from vlmflow.engine.loading import wait_for_device
from vlmflow.models.linear import PackedLinear
from vlmflow.models.pixels import model_dtype
from vlmflow.tasks import Columns, Task

logger = logging.getLogger("vlmflow")

Shape = tuple[int, ...]

_DETECT = "detect"  # whose models know no other dtype than that of the device

# Rows, inner and outer side of the product whose speed is the ceiling: on a processor what a layer of BLIP-base does
# for one image, since larger ones take seconds.
_CEILING_SHAPE = {"cuda": (8192, 8192, 8192), "cpu": (577, 3072, 768)}
_CEILING_REPEATS = 8


class CountedTask:
    """A task that counts the operations of its first batch, and takes every later row for an average one of that."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name, self.reads, self.writes = task.name, task.reads, task.writes
        self.batches_at_once: int = getattr(task, "batches_at_once", 1)
        self._per_row: float | None = None
        self._threads = threading.local()

    @property
    def flops(self) -> float:
        """Of all batches of this thread so far."""
        done: float = getattr(self._threads, "flops", 0.0)
        return done

    @property
    def computes(self) -> bool:
        """Whether its first batch took any operations."""
        return bool(self._per_row)

    @property
    def is_to_count(self) -> bool:
        """Whether the next batch is the one that is counted: no other thread may compute meanwhile."""
        return self._per_row is None

    def __call__(self, batch: pa.Table) -> Columns:
        """Runs the task; the counter never costs an image its values."""
        if self._per_row is None:
            columns, counted = _count(lambda: self.task(batch))
            self._per_row = counted / max(1, batch.num_rows)
        else:
            columns = self.task(batch)
        self._threads.flops = self.flops + self._per_row * batch.num_rows
        return columns


class Ceilings:
    """What the device could do, by the dtype of each task's model; measured once the worker has settled."""

    # Short runs, whose rates mean little, do without.
    _AFTER_BATCHES = 3

    def __init__(self, device: str, dtype: Dtype) -> None:
        self._device, self._wanted = device, dtype
        self._batches = itertools.count(1)
        self._found: dict[torch.dtype, float] = {}

    def are_due(self) -> bool:
        """To be asked behind each batch, by any thread: once it is time to measure."""
        return next(self._batches) == self._AFTER_BATCHES

    def measure(self, tasks: Mapping[str, CountedTask]) -> None:
        """Measures for the tasks that compute anything; nothing else may be at work on the device."""
        for dtype in {self._dtype(name) for name, task in tasks.items() if task.computes}:
            try:
                self._found[dtype] = matmul_ceiling(self._device, dtype)
            except RuntimeError as error:
                if not is_out_of_memory(error):  # the models have taken all there is
                    raise

    def of(self, task: str) -> float | None:
        """FLOP/s; None: not measured yet."""
        return self._found.get(self._dtype(task))

    def _dtype(self, task: str) -> torch.dtype:
        return model_dtype(self._device, "auto" if task == _DETECT else self._wanted)


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best plain product of large matrices, with as many threads as the worker has."""
    rows, inner, outer = _CEILING_SHAPE[torch.device(device).type]
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    call = PackedLinear([torch.nn.Linear(inner, outer, device=device, dtype=dtype)])
    best = math.inf
    with torch.inference_mode():
        for _ in range(_CEILING_REPEATS):
            wait_for_device(device)
            started = time.perf_counter()
            call(x)
            wait_for_device(device)
            best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inner * outer / best


def _count(call: Callable[[], Columns]) -> tuple[Columns, float]:
    counter = _Counter()
    try:
        with counter:
            return call(), float(counter.flops)
    except Exception as error:  # the counter's fault or the batch's: without it we shall know
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        logger.debug("operations could not be counted: %s", error)
    return call(), 0.0


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as torch's FlopCounterMode, which loads torch's compiler: more than a second of every worker's start."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: keeping the compiler out of the method below is what would load it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # what an operator is made of is counted instead of it
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula := _formulas().get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Those of torch's counter, and for operators that it does not know."""
    found: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._native_multi_head_attention: _multi_head_attention,
        torch.ops.aten._addmm_activation: _product,
        torch.ops.aten.bmm: _products,  # that of torch 2.11 fails where a dtype is asked for
    }
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found[torch.ops.mkldnn._linear_pointwise] = _linear
    ours = {operator: shape_wrapper(formula) for operator, formula in found.items()}  # type: ignore[no-untyped-call]
    return flop_registry | ours


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """(..., D) and (E, D)."""
    return 2 * math.prod(x) * weight[0]


def _product(bias: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """(E,), (N, D) and (D, E)."""
    return 2 * math.prod(x) * weight[1]


def _products(x: Shape, weights: Shape, *_: Any, **__: Any) -> int:
    """(B, N, D) and (B, D, E)."""
    return 2 * math.prod(x) * weights[2]


def _attention(queries: Shape, keys: Shape, values: Shape, *_: Any, **__: Any) -> int:
    """(N, H, Q, d), (N, H, K, d) and the same."""
    return 2 * math.prod(queries) * keys[2] + 2 * math.prod(queries[:3]) * keys[2] * values[3]


def _multi_head_attention(queries: Shape, keys: Shape, values: Shape, width: int, *_: Any, **__: Any) -> int:
    """(N, T, D) each: projections to queries, keys and values, attention, and the projection behind it."""
    num_rows, num_tokens = queries[:2]
    return 2 * num_rows * num_tokens * (4 * width * width + 2 * num_tokens * width)
