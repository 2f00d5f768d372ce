"""Models of which torch is all that a worker imports: for tests of the machinery, to which the model does not matter.

open_clip and transformers are most of the time that a worker takes to start, and most tests start some.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional

from vlmflow.families import Family
from vlmflow.models import EncodedImages

SIZE = 32
_CELLS = 8  # of a side, over whose pixels colours are averaged
_DIM = 24
_NUM_WORDS = 64
_WORDS = ("red", "green", "blue", "dark", "bright", "plain", "warm", "cold")


def _write(folder: Path, seed: int, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "image": torch.randn(3 * _CELLS**2, _DIM, generator=generator),
        "words": torch.randn(_NUM_WORDS, _DIM, generator=generator),
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "light"}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_resize": True,
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "resample": 3,
                "rescale_factor": 1 / 255,
                "size": {"height": SIZE, "width": SIZE},
            }
        )
    )
    return folder


def make_light(folder: Path, seed: int = 0) -> Path:
    return _write(folder, seed)


class _Light:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights
        self.dim = _DIM

    @classmethod
    def load(cls, folder: Path, config: object, device: str, dtype: str) -> Any:
        return cls(load_file(folder / "model.safetensors", device=device))

    def _images(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = functional.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, _CELLS)
        return functional.normalize(cells.flatten(1) @ self._weights["image"], dim=1)

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        words = [[zlib.crc32(word.encode()) % _NUM_WORDS for word in text.lower().split()] or [0] for text in texts]
        return functional.normalize(torch.stack([self._weights["words"][of].mean(0) for of in words]), dim=1)


class LightEmbedder(_Light):
    family = Family(("embed",), is_small=True)

    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        return self._images(pixels).cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._texts(texts).cpu().numpy()


class LightCaptioner(_Light):
    family = Family(("caption",), is_small=True)

    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        order = self._images(pixels)[:, : len(_WORDS)].argsort(dim=1, descending=True)[:, : min(3, max_tokens)]
        return ["a " + " ".join(_WORDS[number] for number in row) for row in order.tolist()]


class LightMatcher(_Light):
    family = Family(("match",), is_small=True)

    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        return EncodedImages(self._images(pixels))

    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        return torch.sigmoid(4 * (images.embeds * self._texts(texts)).sum(1)).cpu().numpy()

    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        return (images.embeds * self._texts(texts)).sum(1).cpu().numpy()
