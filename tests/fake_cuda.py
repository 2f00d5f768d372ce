"""Models on a CUDA device that is not there.

Torch's fake tensors have a device, a shape and a dtype, and no values: an operation on two devices fails as on a GPU,
and what would wait for the device is noted. Kernels are not shown: attention, for one, takes another than on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

import vlmflow

_LIBRARY = Path(vlmflow.__file__).parent
_DTYPES = {torch.bool: np.bool_, torch.int64: np.int64, torch.uint8: np.uint8}
# What reads a tensor's values into Python.
_READS = ("numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


def fake_mode() -> FakeTensorMode:
    """Where tensors are made that have no values; one mode takes none of another's."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def build(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model on CUDA, in evaluation; to be called in the mode."""
    with torch.device("cuda"), no_init_weights():  # plain initialisation looks at values
        return cast(make(), dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights of another dtype; its own ``to`` refuses to swap fake ones."""
    for module in model.modules():
        for name, weights in module._parameters.items():
            if weights is not None:
                module._parameters[name] = torch.nn.Parameter(weights.detach().to(dtype), requires_grad=False)
    return model


class HostReads(TorchFunctionMode):
    """Answers what would be read from the device, and notes where; makes the constants that fake mode would run.

    Copies to the device from memory that is not pinned, for which the host waits as well, are noted too.

    All values are zero, and finite. Yet a count is one, something is true of any, nothing of all: decoding goes on.

    ``found``: how often by ``file:function`` of the library.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            self._note_copy(torch.device(device))
            made = func(*args, **kwargs)
            return torch.empty(made.shape, dtype=made.dtype, device=device)
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        tensor = args[0]
        if name in _READS:
            self._note(tensor)
            return _answer(tensor, name)
        if name == "nonzero":
            self._note(tensor)
            return tensor.new_empty((max(1, len(tensor) // 2), tensor.ndim), dtype=torch.int64)
        if name == "pin_memory":  # of fake tensors those of one constant are still known, and run as such
            pinned: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
            pinned.is_in_pinned_memory = True
            return pinned
        if name == "__getitem__" and isinstance(args[1], list):
            self._note_copy(tensor.device)
            return func(tensor, tensor.new_empty(len(args[1]), dtype=torch.int64))
        if name == "__getitem__" and not tensor.is_cuda:  # which fake mode lets pass
            assert not any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(args[1]))
        out = func(*args, **kwargs)
        if name in ("any", "isfinite"):
            out.is_true = True
        is_waited_for = not (kwargs.get("non_blocking") and hasattr(tensor, "is_in_pinned_memory"))
        if name == "to" and not tensor.is_cuda and is_waited_for:
            self._note_copy(out.device)
        if name in ("cpu", "to") and out.device.type == "cpu":
            if kwargs.get("non_blocking"):
                out.is_on_its_way = True  # whoever reads it must have waited for the device
            else:
                self._note(tensor)
            if hasattr(tensor, "is_true"):
                out.is_true = True
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda" or hasattr(tensor, "is_on_its_way"):
            self._count()

    def _note_copy(self, to: torch.device) -> None:
        """From memory that is not pinned: CUDA's stream is waited for."""
        if to.type == "cuda":
            self._count()

    def _count(self) -> None:
        frame = sys._getframe()
        while frame.f_back is not None and not Path(frame.f_code.co_filename).is_relative_to(_LIBRARY):
            frame = frame.f_back
        self.found[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1


def _answer(tensor: torch.Tensor, read: str) -> Any:
    if read in ("__int__", "__index__"):
        return 1
    if read == "__bool__":
        return hasattr(tensor, "is_true")
    zeros = np.zeros(tuple(tensor.shape), _DTYPES.get(tensor.dtype, np.float32))
    return zeros if read == "numpy" else zeros.tolist()


class Operators(TorchDispatchMode):
    """Every operator with the devices and dtypes of its tensors. Not in inference mode, which shows some only whole."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self._devices: list[tuple[str, tuple[str, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # questions such as for a tensor's device
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self._devices.append((str(func), tuple(sorted({tensor.device.type for tensor in tensors}))))
            self.dtypes.setdefault(str(func), set()).update(tensor.dtype for tensor in tensors)
        return out

    @property
    def not_for_a_graph(self) -> list[tuple[str, tuple[str, ...]]]:
        """What no CUDA graph can record: tensors that lie elsewhere, and operators that tell the host something."""
        reads = ("_local_scalar_dense", "nonzero")
        return [
            (name, devices)
            for name, devices in self._devices
            if set(devices) - {"cuda"} or any(read in name for read in reads)
        ]
