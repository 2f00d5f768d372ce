"""Images a second of our CLIP beside open_clip's own.

``python -m benchmarks.clip_embed --device cuda`` (or ``cpu``) builds a ViT-L/14 of the real size (224 px, 428 million
parameters) with random weights, once with GELU and once with the QuickGELU of OpenAI's weights, and embeds the same
images with ours and with open_clip's in one process, turn about, in float32 and bfloat16, from pixels to features;
open_clip is given pixels that are normalised already. Equal are images whose feature is nearest to the same of 100
random vectors. Of the repeats the best counts. The multiplications and additions that the features need, over the time,
are set against the best of a plain product of large matrices on the same device, measured between the repeats.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.random_models import VIT_L_14, write_clip
from benchmarks.side_by_side import Place, Run, Workload, compare
from vlmflow.models.clip import build, image_features
from vlmflow.models.clip_packed import pack_image_tower
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing

ARCHITECTURE = VIT_L_14
_NUM_PROBES = 100


class Weights:
    """The folders of both models; stands for a model that is cast."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._folder = tempfile.TemporaryDirectory()
        self.folders = {
            "": write_clip(Path(self._folder.name) / "gelu", ARCHITECTURE),
            "_quick_gelu": write_clip(Path(self._folder.name) / "quick", ARCHITECTURE | {"quick_gelu": True}),
        }

    def to(self, dtype: torch.dtype) -> Weights:
        """Both are built in the dtype later, as a job builds them."""
        return self


def sides(weights: Weights, place: Place) -> dict[str, Run]:
    """Ours and open_clip's, on the same weights: pixels to (N, 1) numbers of the nearest probe."""
    device, dtype = place
    probes = torch.randn(_NUM_PROBES, ARCHITECTURE["embed_dim"], generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, Run] = {}
    for name, folder in weights.folders.items():
        found[f"ours{name}"] = partial(_ours, *_ours_of(folder, place), probes)
        normalize = _normalizer(device, dtype)
        found[f"open_clip{name}"] = _Theirs(build(folder, None, device, dtype), normalize, probes)
    return found


def _normalizer(device: str, dtype: torch.dtype) -> PixelNormalizer:
    size = ARCHITECTURE["vision_cfg"]["image_size"]
    return PixelNormalizer(Preprocessing(size, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), device, dtype)


def _ours_of(folder: Path, place: Place) -> tuple[torch.nn.Module, PixelNormalizer]:
    """As :class:`vlmflow.models.clip.ClipEmbedder` is loaded."""
    device, dtype = place
    if device == "cuda":
        normalize = _normalizer(device, dtype)
        return build(folder, None, device, dtype, packed_for=normalize), normalize
    model = build(folder, None, device, torch.float32)
    assert pack_image_tower(model, dtype)
    return model, _normalizer(device, torch.float32)


def _ours(
    model: torch.nn.Module, normalize: PixelNormalizer, probes: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    return _nearest(image_features(model, normalize, pixels), probes)


class _Theirs:
    """Keeps the pixels of the last batch, normalised."""

    def __init__(self, model: torch.nn.Module, normalize: PixelNormalizer, probes: torch.Tensor) -> None:
        self._model, self._normalize, self._probes = model, normalize, probes
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._last is None or self._last[0] is not pixels:
            self._last = (pixels, self._normalize(pixels))
        return _nearest(self._model.encode_image(self._last[1]), self._probes)  # type: ignore[operator]


def _nearest(features: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    return (features.float() @ probes.T).argmax(dim=1, keepdim=True)


def flops_per_image() -> float:
    """Twice the multiplications of all products of the image tower."""
    vision = ARCHITECTURE["vision_cfg"]
    patches, width = (vision["image_size"] // vision["patch_size"]) ** 2, vision["width"]
    tokens = patches + 1
    layer = tokens * 12 * width * width + 2 * tokens * tokens * width
    embed = patches * 3 * vision["patch_size"] ** 2 * width
    return 2.0 * (embed + vision["layers"] * layer + width * ARCHITECTURE["embed_dim"])


def main() -> None:
    size = ARCHITECTURE["vision_cfg"]["image_size"]
    compare(Workload("clip_embed", "image", __doc__ or "", size, flops_per_image(), Weights, sides, other="open_clip"))


if __name__ == "__main__":
    main()
