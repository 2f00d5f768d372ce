"""Regions by a two-stage detector of torchvision (Faster R-CNN: Ren et al. 2015, arXiv:1506.01497)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from vlmflow.errors import WeightsError
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.vilbert.finders import DetectorRegions
from vlmflow.models.vilbert.regions import Regions, best_boxes, pad_regions
from vlmflow.models.weights import check_keys


class TorchvisionRegions:
    """The boxes that a detector thinks hold something, with the features behind its box head.

    As bottom-up attention takes them (Anderson et al. 2018, arXiv:1707.07998): proposals go through the box head
    once, are refined for the class that they show most, and the best by score are kept, whatever their classes.
    """

    def __init__(self, model: FasterRCNN, normalize: PixelNormalizer, source: DetectorRegions) -> None:
        self._model, self._normalize, self._source = model, normalize, source
        self.num_features: int = model.roi_heads.box_predictor.cls_score.in_features

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Regions:
        """(N, 3, S, S) uint8 RGB -> regions with (R, F) features of the box head."""
        inputs = self._normalize(pixels)
        side = inputs.shape[-1]
        images = ImageList(inputs, [(side, side)] * len(inputs))
        levels = self._model.backbone(inputs)
        proposals, _ = self._model.rpn(images, levels)
        heads: Any = self._model.roi_heads
        features = heads.box_head(heads.box_roi_pool(levels, proposals, images.image_sizes))
        logits, offsets = heads.box_predictor(features)
        boxes = heads.box_coder.decode(offsets, proposals)  # (B, classes, 4)
        scores, classes = logits.softmax(-1)[:, 1:].max(-1)  # class 0 is the background
        refined = boxes[torch.arange(len(boxes)), classes + 1].clamp(0, side) / side
        counts = [len(of) for of in proposals]
        parts = zip(features.split(counts), refined.split(counts), scores.split(counts), strict=True)
        kept = [self._best(*part) for part in parts]
        return pad_regions([of for of, _ in kept], [of for _, of in kept])

    def _best(
        self, features: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        source = self._source
        sides = (boxes[:, 2:] - boxes[:, :2]).min(1).values
        kept = best_boxes(
            boxes,
            scores.masked_fill(sides <= 0, -1),  # a box without an area shows nothing
            max_regions=source.max_regions,
            min_score=source.min_score,
            max_overlap=source.max_overlap,
        )
        return features[kept].float(), boxes[kept].float()


def load_detector_regions(path: Path, source: DetectorRegions, device: str) -> TorchvisionRegions:
    """Builds the detector without weights of its own and fills in the safetensors; always in float32.

    Raises:
        WeightsError: torchvision has no such two-stage detector, or the weights are absent or do not fit.
    """
    model = _build(source)
    try:
        tensors = load_file(path)
        keys = model.load_state_dict(tensors, strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"weights: {path} cannot be loaded as {source.architecture}: {reason}",
            remedy="Save the state dict of that detector as safetensors there, and set num_classes to its own.",
        ) from error
    check_keys(path, keys.missing_keys, keys.unexpected_keys)
    preprocessing = Preprocessing(source.size, "bilinear", source.mean, source.std)
    normalize = PixelNormalizer(preprocessing, device, torch.float32)
    return TorchvisionRegions(model.to(device).eval().requires_grad_(False), normalize, source)


def _build(source: DetectorRegions) -> FasterRCNN:
    names = torchvision.models.list_models(module=torchvision.models.detection, include="fasterrcnn*")
    if source.architecture not in names:
        raise WeightsError(
            f"weights: regions by {source.architecture}, which is no Faster R-CNN of torchvision",
            remedy=f"Use one of {', '.join(names)}.",
        )
    model: FasterRCNN = torchvision.models.get_model(
        source.architecture, weights=None, weights_backbone=None, num_classes=source.num_classes
    )
    return model
