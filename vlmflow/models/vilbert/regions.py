"""Regions of images: what a detector saw, and where. N: images, R: regions of the image that has most, F: features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Regions:
    """Regions of a batch of images, padded to the longest.

    Attributes:
        features: (N, R, F) float32.
        boxes: (N, R, 4) float32: left, top, right, bottom, as parts of the image, in [0, 1].
        mask: (N, R) bool, False for padding.
    """

    features: torch.Tensor
    boxes: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.features)


class RegionFinder(Protocol):
    """Finds the regions of images."""

    num_features: int  # F

    def __call__(self, pixels: torch.Tensor) -> Regions:
        """(N, 3, S, S) uint8 RGB at the size that `regions.json` names -> regions, the best first."""


def pad_regions(features: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> Regions:
    """Joins images with regions of their own: (R_i, F) and (R_i, 4) each; an image may have none."""
    if not features:
        return Regions(torch.zeros(0, 0, 0), torch.zeros(0, 0, 4), torch.zeros(0, 0, dtype=torch.bool))
    counts = torch.tensor([len(rows) for rows in boxes], device=boxes[0].device)
    padded = pad_sequence(list(boxes), batch_first=True)
    mask = torch.arange(padded.shape[1], device=counts.device) < counts[:, None]
    return Regions(pad_sequence(list(features), batch_first=True), padded, mask)


def with_whole_image(regions: Regions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model reads: the whole image in the first place, with the mean of its regions' features.

    Returns:
        (N, 1 + R, F) features; (N, 1 + R, 5) boxes with their area; (N, 1 + R) mask.
    """
    shown = regions.mask[..., None]
    mean = (regions.features * shown).sum(1) / shown.sum(1).clamp(min=1)
    features = torch.cat([mean[:, None], regions.features], dim=1)
    whole = regions.boxes.new_tensor([0, 0, 1, 1]).expand(len(regions), 1, 4)
    boxes = torch.cat([whole, regions.boxes], dim=1)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    mask = torch.nn.functional.pad(regions.mask, (1, 0), value=True)
    return features, torch.cat([boxes, area[..., None]], dim=-1), mask


def best_boxes(
    boxes: torch.Tensor, scores: torch.Tensor, *, max_regions: int, min_score: float, max_overlap: float
) -> torch.Tensor:
    """Which of an image's boxes to keep: the best that overlap no better one, whatever their classes.

    Args:
        boxes: (B, 4). scores: (B,).
        max_overlap: intersection over union from which on the weaker of two boxes is dropped.

    Returns:
        (K,) int64, the best first.
    """
    likely = (scores >= min_score).nonzero()[:, 0]
    # Importing it takes a worker as long as torch itself, and tasks import this module for models that see no regions.
    from torchvision.ops import nms

    kept = nms(boxes[likely].float(), scores[likely].float(), max_overlap)
    return likely[kept[:max_regions]]
