"""Vision towers of one worker: those with equal weights are held once, and run once per batch."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import torch

from vlmflow.models.blip_fast.vision import VisionTower
from vlmflow.models.pixels import PixelNormalizer


class SharedTower:
    """A vision tower that keeps the features of each thread's last batch, once more than one model uses it."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._threads = threading.local()
        self.num_users = 0
        self.num_passes = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, T, D), which, like the pixels, nobody may write to.

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        last: tuple[torch.Tensor, torch.Tensor] | None = getattr(self._threads, "last", None)
        if last is not None and same_pixels(last[0], pixels):
            return last[1]
        self._threads.last = last = None  # a thread never holds two batches at once
        features = self._tower(pixels)
        self.num_passes += 1
        if self.num_users > 1:
            self._threads.last = (pixels, features)
        return features


class VisionTowers:
    """The towers that the models of a worker asked for, found by their content, never by a model's name."""

    def __init__(self) -> None:
        self._towers: dict[str, SharedTower] = {}

    def share(self, model: Any, normalize: PixelNormalizer) -> SharedTower:
        """The tower of a ``BlipVisionModel``: one given out before, where weights, shape and preprocessing are equal.

        Equal are the values in memory, after the conversion to the dtype in which they are used.
        """
        digest = _digest(model, normalize)
        if digest not in self._towers:
            self._towers[digest] = SharedTower(VisionTower(model, normalize))
        tower = self._towers[digest]
        tower.num_users += 1
        return tower


def same_pixels(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether all bytes are equal; hashing both would take longer than comparing them, and prove less."""
    if first is second:
        return True
    where = (first.device, first.data_ptr(), first.shape, first.stride(), first.dtype)
    if where == (second.device, second.data_ptr(), second.shape, second.stride(), second.dtype):
        return True
    if first.device != second.device:
        return False
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _digest(model: Any, normalize: PixelNormalizer) -> str:
    config = model.config
    total = hashlib.sha256(normalize.describe().encode())
    # What the tensors do not tell of the arithmetic.
    total.update(
        f"{config.num_attention_heads} {config.hidden_act} {config.layer_norm_eps} {config.patch_size}".encode()
    )
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
