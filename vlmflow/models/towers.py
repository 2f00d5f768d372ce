"""Vision towers of one worker: those with equal weights are held once, and run once per batch."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from vlmflow.config import ModelConfig
from vlmflow.models.blip_fast.vision import VisionTower
from vlmflow.models.kept import KeptFeatures
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.weights import weights_digest


class SharedTower:
    """A vision tower that keeps the features of each thread's batch, once more than one model uses it.

    Attributes:
        num_users: models that use it.
        num_passes: calls that computed anything.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], *, keeps_batch: bool = False) -> None:
        """Wraps a tower.

        Args:
            encode: (N, 3, S, S) uint8 RGB -> (N, ...), which keeps the rows apart.
            keeps_batch: all that it gave of a batch is kept, being small; else what it gave last.
        """
        self._encode, self._keeps_batch = encode, keeps_batch
        self._threads = threading.local()
        self.num_users = 0
        self.num_passes = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 RGB -> (N, ...), which, like the pixels, nobody may write to.

        Of images that this thread has had in the batch the features are those it got then.

        Raises:
            ValueError: the pixels are not of the model's size or dtype.
        """
        if self.num_users < 2:
            return self._pass(pixels)
        kept: KeptFeatures | None = getattr(self._threads, "kept", None)
        if kept is None:
            kept = self._threads.kept = KeptFeatures(self._pass, keeps_all=self._keeps_batch)
        return kept.of(pixels)

    def forget(self) -> None:
        """Lets go what is kept for this thread."""
        self._threads.kept = None

    def _pass(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self._encode(pixels)
        self.num_passes += 1
        return features


class HasTower(Protocol):
    """A model that several tasks may use."""

    tower: SharedTower


Model = TypeVar("Model", bound=HasTower)


class VisionTowers:
    """The towers that the models of a worker asked for, found by their content, never by a model's name."""

    def __init__(self) -> None:
        self._towers: dict[str, SharedTower] = {}
        self._models: dict[Hashable, HasTower] = {}

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

    def share_model(self, content: Hashable, load: Callable[[], Model]) -> Model:
        """A whole model: the one given out before of equal content, of which nothing is read again.

        Args:
            content: see :func:`content_of`.
            load: gives the model, unless there is one.
        """
        if content not in self._models:
            self._models[content] = load()
        model = cast(Model, self._models[content])
        model.tower.num_users += 1
        return model

    @contextmanager
    def of_batch(self) -> Iterator[None]:
        """A batch of this thread, behind which nothing is kept of it: that is large, and of no use to the next."""
        try:
            yield
        finally:
            for tower in (*self._towers.values(), *(model.tower for model in self._models.values())):
                tower.forget()


def content_of(
    folder: Path, config: ModelConfig, preprocessing: Preprocessing, device: str, dtype: torch.dtype
) -> Hashable:
    """Equal for models of one family that give equal outputs: by hashes of their files, never by their names."""
    return config.family, weights_digest(folder, config.family), preprocessing.describe(), device, dtype


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
