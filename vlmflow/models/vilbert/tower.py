"""Regions from the patches of a CLIP tower: a small head that finds boxes, and the patches' features in them.

For small models beside a CLIP whose tower they share, as the starter's. Each patch says whether it lies in a thing
and how far the thing's sides are, as FCOS does (Tian et al. 2019, arXiv:1904.01355).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import roi_align

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models.clip import load_tower
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.sizes import in_few_sizes
from vlmflow.models.vilbert.finders import TowerRegionsSource
from vlmflow.models.vilbert.regions import Regions, best_boxes, pad_regions

_EARLY_LAYER = 1


class BoxHead(nn.Module):
    """Patches to boxes. N: images, P: patches of the tower, G x G of them, D: numbers of a patch."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, 5, 1),
        )

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, P, D) -> (N, P) logits of lying in a thing, and (N, P, 4) boxes as parts of the image."""
        values = self.layers(as_grid(patches)).flatten(2).transpose(1, 2).float()
        reach = values[..., 1:].sigmoid()
        centre = patch_centres(patches.shape[1], patches.device)
        boxes = torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], dim=-1)
        return values[..., 0], boxes.clamp(0, 1)


class TowerRegions:
    """Finds regions with a CLIP tower."""

    def __init__(self, tower: Any, head: BoxHead, normalize: PixelNormalizer, source: TowerRegionsSource) -> None:
        """``tower``: the ``visual`` of an open_clip model whose patches are a square grid."""
        self._tower, self._head, self._normalize, self._source = tower, head, normalize, source
        # The early one has looked around least, and knows best where a thing ends.
        self._layers = sorted({_EARLY_LAYER, len(tower.transformer.resblocks) - 1})
        self.num_features: int = len(self._layers) * tower.ln_post.normalized_shape[0]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Regions:
        """(N, 3, S, S) uint8 RGB -> regions; the whole image is the last one of each."""
        return self.find(in_few_sizes(lambda given: self.patches(self._normalize(given)), pixels, self._normalize))

    @torch.no_grad()
    def find(self, patches: torch.Tensor) -> Regions:
        """(N, P, D) patches -> regions."""
        logits, boxes = self._head(patches)
        whole = boxes.new_tensor([[0, 0, 1, 1]])
        scores = logits.sigmoid()
        kept = [torch.cat([of[self._best(of, score)], whole]) for of, score in zip(boxes, scores, strict=True)]
        return pad_regions(pool_patches(patches, kept), kept)

    @torch.no_grad()
    def patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) normalised -> (N, P, D): what an early layer says of a patch, and what the last does."""
        layers = self._tower.forward_intermediates(
            inputs, indices=self._layers, intermediates_only=True, normalize_intermediates=True, output_fmt="NLC"
        )["image_intermediates"]
        return torch.cat(layers, dim=-1)

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        source = self._source
        return best_boxes(
            boxes, scores, max_regions=source.max_regions, min_score=source.min_score, max_overlap=source.max_overlap
        )


def load_tower_regions(
    clip: Path, config: ModelConfig, head_file: Path, source: TowerRegionsSource, device: str, dtype: torch.dtype
) -> TowerRegions:
    """Loads the tower of ``clip`` and the head for boxes.

    Raises:
        WeightsError: weights are absent or do not fit.
    """
    tower = load_tower(clip, config, device, dtype)
    try:
        tensors = load_file(head_file)
        width = tensors["layers.0.weight"].shape[1]
        head = BoxHead(width, source.box_head_width)
        head.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"weights: {head_file} cannot be loaded as a head for boxes: {reason}",
            remedy="Copy the model's whole folder again.",
        ) from error
    normalize = PixelNormalizer(read_preprocessing(clip, config), device, dtype)
    return TowerRegions(tower, head.to(device, dtype).eval().requires_grad_(False), normalize, source)


def as_grid(patches: torch.Tensor) -> torch.Tensor:
    """(N, P, D) -> (N, D, G, G)."""
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)


def patch_centres(num_patches: int, device: torch.device) -> torch.Tensor:
    """(P, 2) x and y of the patches' centres, as parts of the image, row by row."""
    side = round(num_patches**0.5)
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def pool_patches(patches: torch.Tensor, boxes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of the patches in each box (RoIAlign with one bin; He et al. 2017, arXiv:1703.06870).

    Args:
        patches: (N, P, D). boxes: (R_i, 4) of each image, as parts of it.

    Returns:
        (R_i, D) float32 of each image.
    """
    grid = as_grid(patches.float())
    side = grid.shape[-1]
    floats = [of.float() for of in boxes]
    pooled = roi_align(grid, floats, 1, spatial_scale=side, sampling_ratio=side // 2, aligned=True)
    return list(pooled[:, :, 0, 0].split([len(of) for of in boxes]))
