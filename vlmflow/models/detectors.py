"""Detectors of a policy: classifiers that look at the pixels themselves. What they are, and how they are loaded.

A detector gives scores in [0, 1] for its outputs; what they mean stands in the policy. N: images, S: side of the
pixels, O: outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from vlmflow.config import ModelConfig
from vlmflow.errors import DetectorError, PolicyError
from vlmflow.families import FAMILIES
from vlmflow.imaging import PixelRequest
from vlmflow.models.identity import ModelIdentity
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.weights import expanded, locate, read_json, section_of, weights_digest
from vlmflow.moderation.policy import Detector, Policy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class PixelDetector(Protocol):
    """A loaded detector."""

    def score(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, O) scores in [0, 1], in the order of the policy's outputs."""


@dataclass(frozen=True)
class DetectorSetup:
    """A detector as the driver settles it, without loading it; can be pickled."""

    name: str
    config: Detector
    identity: ModelIdentity
    request: PixelRequest

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs, in the order of the scores."""
        return tuple(self.config.outputs)

    @property
    def fingerprint(self) -> str:
        """A short digest of what its scores depend on: thresholds do not count, questions do."""
        questions = [(name, output.question) for name, output in self.config.outputs.items() if output.question]
        return self.identity.fingerprint(f"detect {questions}" if questions else "detect")


def prepare_detectors(policy: Policy, views: tuple[str, ...]) -> tuple[DetectorSetup, ...]:
    """Settles a policy's detectors from their files.

    Raises:
        DetectorError: a package that a detector needs is not installed, it has no such output or no scores, or its
            weights are not those that the policy was set for.
        WeightsError: weights that are absent or cannot be used.
    """
    return tuple(_prepare(detector, policy, views) for detector in policy.detectors)


def _prepare(detector: Detector, policy: Policy, views: tuple[str, ...]) -> DetectorSetup:
    identity = identify_detector(detector)
    shown = ("squash", *(view for view in views if view != "squash"))
    if detector.family == "opennsfw":
        from vlmflow.models.opennsfw import OUTPUT, SIZE

        request = PixelRequest(SIZE, "bilinear", shown)
        _check_outputs(detector, (OUTPUT,))
    else:
        folder = locate(model_config(detector))
        preprocessing = read_preprocessing(folder, model_config(detector))
        request = PixelRequest(preprocessing.size, preprocessing.interpolation, shown)
        if detector.family == "image_classification":
            _check_outputs(detector, _classes(folder / "config.json", detector))
    if detector.weights is not None and detector.weights != identity.weights_digest:
        raise DetectorError(
            f"policy {policy.name} {policy.version}: detector {detector.name} has weights "
            f"{identity.weights_digest[:12]}, its thresholds were set for {detector.weights[:12]}",
            remedy="Use the weights that the policy names, or set thresholds for these and change `weights`.",
        )
    if detector.path is not None:  # workers of a cluster work in the folder where it was started
        path = expanded(model_config(detector).path or "")
        detector = detector.model_copy(update={"path": str(path.absolute())})
    return DetectorSetup(detector.name, detector, identity, request)


def identify_detector(detector: Detector) -> ModelIdentity:
    """What rows remember of a detector, from its files alone.

    Raises:
        DetectorError: a package that it needs is not installed.
        WeightsError: weights that are absent or cannot be used.
    """
    if detector.family == "opennsfw":
        from vlmflow.models.opennsfw import identify_opennsfw

        return identify_opennsfw()
    config = model_config(detector)
    folder = locate(config)
    return ModelIdentity(
        id=detector.repo or folder.name,
        revision=detector.revision or "local",
        weights_digest=weights_digest(folder, detector.family),
        preprocessing=read_preprocessing(folder, config).describe(),
        code_version=FAMILIES[detector.family].code_version,
    )


def model_config(detector: Detector) -> ModelConfig:
    """Where the files of a detector are.

    Raises:
        PolicyError: the family needs none.
    """
    if detector.family == "opennsfw":
        raise PolicyError(f"detector {detector.name}: opennsfw comes with its package")
    return ModelConfig(family=detector.family, path=detector.path, repo=detector.repo, revision=detector.revision)


def load_detector(setup: DetectorSetup, device: str) -> PixelDetector:
    """Loads a detector; in a worker.

    Raises:
        DetectorError: its package is not installed here.
        WeightsError: the weights do not fit, or are not on this machine.
        ModelMemoryError: the device has no memory left for it.
    """
    from vlmflow.device_errors import fitting

    with fitting(f"the detector {setup.name}", device):
        return _load(setup, device)


def _load(setup: DetectorSetup, device: str) -> PixelDetector:
    match setup.config.family:
        case "opennsfw":
            from vlmflow.models.opennsfw import OpenNsfw

            return OpenNsfw.load()
        case "image_classification":
            from vlmflow.models.classifier import ImageClassifier

            config = model_config(setup.config)
            return ImageClassifier.load(locate(config), config, setup.outputs, device)
        case "vlm_judge":
            from vlmflow.models.judge import VlmJudge

            questions = [output.question or "" for output in setup.config.outputs.values()]
            return VlmJudge.load(locate(model_config(setup.config)), questions, device)
        case _:
            assert_never(setup.config.family)


def _classes(path: Path, detector: Detector) -> tuple[str, ...]:
    """The names of a classifier's classes, which must be such that they can be told apart."""
    values = read_json(path)
    of_timm, ours = values.get("label_names"), section_of(values, "id2label", path).values()
    names = tuple(str(name) for name in (of_timm if isinstance(of_timm, list) else ours))
    if not names and "pretrained_cfg" not in values:  # two classes by the names that transformers gives are not saved
        names = tuple(f"LABEL_{number}" for number in range(values.get("num_labels") or 2))
    if len(names) == 1 and values.get("problem_type") != "multi_label_classification":
        raise DetectorError(
            f"detector {detector.name}: {path} has one class, whose softmax is 1 for every image",
            remedy="If its score is a sigmoid, set problem_type to multi_label_classification there.",
        )
    return names


def _check_outputs(detector: Detector, there: tuple[str, ...]) -> None:
    unknown = [name for name in detector.outputs if name not in there]
    if unknown:
        raise DetectorError(
            f"detector {detector.name} has no output {', '.join(unknown)}",
            remedy=f"Name one of {', '.join(there[:20])}." if there else "Name its classes in id2label of config.json.",
        )
    doubled = [name for name in detector.outputs if there.count(name) > 1]
    if doubled:
        raise DetectorError(
            f"detector {detector.name} has several outputs called {', '.join(doubled)}: each one's score is but a part",
            remedy="Give each class a name of its own in config.json (id2label or label_names), and the policy those.",
        )
