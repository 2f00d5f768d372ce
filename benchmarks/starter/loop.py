"""The training loop of every stage: bf16 weights with float32 masters, a time budget, checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn

_WARM_UP = 0.04
_FINAL_RATE = 0.02
_CHECKPOINT_S = 60.0
_LOG_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """``minutes``: wall-clock budget over all resumed parts; ``max_steps`` ends a run earlier (tests)."""

    minutes: float
    rate: float = 1.2e-3
    weight_decay: float = 0.05
    max_steps: int | None = None

    def rate_at(self, progress: float) -> float:
        """Linear warm-up, then a cosine down to 2% of the rate, over the time budget."""
        if progress < _WARM_UP:
            return self.rate * max(progress / _WARM_UP, 0.01)
        angle = math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
        return self.rate * (_FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(angle)))


class Masters:
    """Float32 copies of a bf16 model's weights, updated by AdamW and copied back (arXiv:1710.03740)."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._copies = [weight.detach().float().clone() for weight in self._weights]
        decayed = [copy for copy in self._copies if copy.ndim >= 2]
        plain = [copy for copy in self._copies if copy.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        model.bfloat16()

    def step(self, rate: float) -> None:
        """One update from the mean of the gradients of all processes."""
        for copy, weight in zip(self._copies, self._weights, strict=True):
            copy.grad = torch.zeros_like(copy) if weight.grad is None else weight.grad.float()
            weight.grad = None
        if distributed.is_initialized():
            self._share_gradients()
        nn.utils.clip_grad_norm_(self._copies, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._copy_back()

    def state(self) -> dict[str, object]:
        return {"weights": dict(zip(self.names, self._copies, strict=True)), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        for name, copy in zip(self.names, self._copies, strict=True):
            copy.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._copy_back()

    def _share_gradients(self) -> None:
        flat = torch.cat([copy.grad.flatten() for copy in self._copies if copy.grad is not None])
        distributed.all_reduce(flat)
        parts = (flat / distributed.get_world_size()).split([copy.numel() for copy in self._copies])
        for copy, part in zip(self._copies, parts, strict=True):
            copy.grad = part.view_as(copy)

    def _copy_back(self) -> None:
        with torch.no_grad():
            for copy, weight in zip(self._copies, self._weights, strict=True):
                weight.copy_(copy)


def train(
    model: nn.Module, losses: Callable[[int], dict[str, torch.Tensor]], schedule: Schedule, checkpoint: Path
) -> int:
    """Trains until the time is over; resumes from ``checkpoint`` if it is there; returns the number of steps.

    Args:
        losses: the named losses of the batch of that number; their sum is minimised. A function of the number alone,
            so that a resumed run sees the data that an unbroken one would have.

    In a process group every process takes batches of its own, and the first one keeps time, log and checkpoints.
    """
    rank, num_processes = _place()
    masters = Masters(model, schedule.weight_decay)
    step, elapsed = 0, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        masters.load(saved["masters"])
        step, elapsed = saved["step"], saved["elapsed_s"]
    started, saved_at = time.monotonic() - elapsed, time.monotonic()
    while elapsed < schedule.minutes * 60 and step != schedule.max_steps:
        named = losses(step * num_processes + rank)
        torch.stack(list(named.values())).sum().backward()
        masters.step(schedule.rate_at(elapsed / (schedule.minutes * 60)))
        step, elapsed = step + 1, _agree(time.monotonic() - started)
        if rank == 0 and step % _LOG_STEPS == 0:
            values = " ".join(f"{name} {value.item():.3f}" for name, value in named.items())
            print(f"step {step} {elapsed:.0f}s {values}", flush=True)
        if rank == 0 and time.monotonic() - saved_at > _CHECKPOINT_S:
            _save(checkpoint, masters, step, elapsed)
            saved_at = time.monotonic()
    if rank == 0:
        _save(checkpoint, masters, step, elapsed)
    return step


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the float32 weights of a checkpoint into a model that was built the same way."""
    saved = torch.load(checkpoint, weights_only=True)["masters"]["weights"]
    result = model.load_state_dict(saved, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys


def _save(path: Path, masters: Masters, step: int, elapsed_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"masters": masters.state(), "step": step, "elapsed_s": elapsed_s}, partial)
    partial.replace(path)  # a kill in the middle leaves the earlier one whole


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def _agree(elapsed_s: float) -> float:
    """The first process's clock: all of them stop at one step."""
    if not distributed.is_initialized():
        return elapsed_s
    clock = torch.tensor([elapsed_s], dtype=torch.float64)
    distributed.broadcast(clock, src=0)
    return float(clock)
