"""Finds what a phrase means in one image, here and now: without a cluster and without a catalog."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vlmflow.config import Frozen, ImageLimits, ModelConfig
from vlmflow.errors import ConfigError
from vlmflow.models import locate, pixel_request
from vlmflow.models.vilbert.adapter import VilbertGrounder
from vlmflow.search.query import decode_image


class GroundedRegion(Frozen):
    """A region that a phrase may mean, in pixels of the image as displayed."""

    left: float
    top: float
    right: float
    bottom: float
    score: float  # in [0, 1]


class PhraseGrounder:
    """Loads a model once and looks for phrases in images, one by one.

    Args:
        model: of the family vilbert, with regions that it finds itself.

    Raises:
        ConfigError: another family, or a model whose regions are columns of a source.
        WeightsError: the weights are absent or do not fit, or were not trained for this.
    """

    def __init__(self, model: ModelConfig, device: str = "cpu", limits: ImageLimits | None = None) -> None:
        if model.family != "vilbert":
            raise ConfigError(f"family {model.family} finds no phrases", remedy="Use a model of the family vilbert.")
        request = pixel_request("match", model, ())
        if request is None:
            raise ConfigError(
                f"{model.repo or model.path} reads regions from a column of the source, not images",
                remedy="Give your regions to vlmflow.models.vilbert.adapter.VilbertGrounder.",
            )
        self._request, self._limits = request, limits or ImageLimits()
        self._grounder = VilbertGrounder.load(locate(model), device)

    def ground(self, image: str | Path | bytes, phrases: list[str]) -> list[list[GroundedRegion]]:
        """The regions of the image for each phrase, the likeliest first.

        Raises:
            ImageError: the image cannot be decoded, or exceeds the limits.
            ConfigError: the file cannot be read.
            QuestionError: a phrase is longer than the model can take.
        """
        decoded = decode_image(image, [self._request], self._limits)
        _, shown = decoded.pixels[self._request.key][0]
        pixels = torch.from_numpy(np.require(shown, requirements=["C", "W"])).permute(2, 0, 1)[None]
        scale = np.array([decoded.facts.width, decoded.facts.height] * 2)
        (found,) = self._grounder.ground(pixels, [phrases])
        return [
            [
                GroundedRegion(left=box[0], top=box[1], right=box[2], bottom=box[3], score=score)
                for box, score in zip((of.boxes * scale).tolist(), of.scores.tolist(), strict=True)
            ]
            for of in found
        ]


def ground_phrases(image: str | Path | bytes, phrases: list[str], model: ModelConfig) -> list[list[GroundedRegion]]:
    """Looks for phrases in one image; see :class:`PhraseGrounder`, which is faster for more than one.

    Returns:
        For each phrase the regions of the image, the likeliest first.

    Raises:
        ConfigError, WeightsError: as :class:`PhraseGrounder`.
        ImageError, QuestionError: as :meth:`PhraseGrounder.ground`.
    """
    return PhraseGrounder(model).ground(image, phrases)
