"""Any image-classification checkpoint of transformers as a detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import as_weights_error, check_finite, load_model
from vlmflow.models.sizes import in_few_sizes
from vlmflow.models.weights import check_keys, read_json


class ImageClassifier:
    """A classification head over the image. N: images, S: side of the pixels, O: outputs that the policy names."""

    def __init__(self, model: Any, normalize: PixelNormalizer, outputs: Sequence[str]) -> None:
        self._model, self._normalize = model, normalize
        classes = {str(name): int(number) for number, name in model.config.id2label.items()}
        self._columns = [classes[name] for name in outputs]
        self._is_multi_label = model.config.problem_type == "multi_label_classification"

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, outputs: Sequence[str], device: str) -> Self:
        """Loads safetensors from a folder: bfloat16 on a GPU that has it, float32 elsewhere.

        Raises:
            WeightsError: the weights do not fit the configuration, or need code that transformers does not have; it
                names what timm would download; or the model cannot score an image of the size that it is to be shown.
        """
        from transformers import AutoModelForImageClassification

        architecture = read_json(folder / "config.json").get("architecture")  # of timm's models
        if ":" in str(architecture):
            raise WeightsError(
                f"weights: {folder} builds its model from {architecture}, which timm downloads at no fixed revision",
                remedy="Write the name of timm's architecture there, without a source before it.",
            )
        dtype = model_dtype(device)
        model, missing, unexpected = load_model(AutoModelForImageClassification, folder, dtype, device)
        check_keys(folder, missing, unexpected)
        preprocessing = read_preprocessing(folder, config)
        classifier = cls(model.to(device), PixelNormalizer(preprocessing, device, dtype), outputs)
        # Some models take pixels of any size, and others say only then that they do not.
        what = f"the model of {folder} cannot score an image of {preprocessing.size} pixels a side"
        with as_weights_error(what, "Copy preprocessor_config.json and config.json of one model."):
            scores = classifier.score(torch.zeros((1, 3, preprocessing.size, preprocessing.size), dtype=torch.uint8))
            check_finite(folder, dtype, torch.from_numpy(scores))
        return classifier

    @torch.inference_mode()
    def score(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, O): softmax over all classes, or a sigmoid each where several can hold."""
        logits = in_few_sizes(self._logits, pixels, self._normalize).float()
        scores = logits.sigmoid() if self._is_multi_label else logits.softmax(dim=-1)
        return cast("NDArray[np.float32]", scores[:, self._columns].cpu().numpy())

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(pixel_values=self._normalize(pixels)).logits
        return logits
