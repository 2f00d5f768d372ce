"""Where a ViLBERT's regions come from, by the `regions.json` of its folder.

    {"kind": "detector", "architecture": "fasterrcnn_resnet50_fpn", "size": 800, "max_regions": 36}
    {"kind": "tower", "folder": "../clip", "weights_digest": "...", "box_head_width": 64, "max_regions": 8}
    {"kind": "columns", "max_regions": 100}

``detector``: a two-stage detector of torchvision, its state dict in `detector.safetensors`. ``tower``: a CLIP beside
this folder, and a head for boxes in `regions.safetensors`. ``columns``: features that the caller has computed; see
:mod:`vlmflow.sources.regions`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models.preprocessing import Preprocessing, read_preprocessing
from vlmflow.models.weights import read_json, weights_digest
from vlmflow.validation import describe_validation

if TYPE_CHECKING:
    import torch

    from vlmflow.models.vilbert.regions import RegionFinder

REGIONS_FILE = "regions.json"
DETECTOR_FILE = "detector.safetensors"
BOX_HEAD_FILE = "regions.safetensors"

Share = Annotated[float, Field(ge=0, le=1)]
Triple = tuple[float, float, float]


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    max_regions: Annotated[int, Field(ge=1, le=1000)]


class _Found(_Source):
    """Boxes that are chosen here."""

    min_score: Share = 0.2
    max_overlap: Share = 0.5  # intersection over union from which on the weaker of two boxes is dropped


class DetectorRegions(_Found):
    """A detector of torchvision."""

    kind: Literal["detector"]
    architecture: str  # torchvision's name, such as fasterrcnn_resnet50_fpn
    num_classes: Annotated[int, Field(ge=2)] = 91  # the background counted
    size: Annotated[int, Field(ge=32)] = 800  # side of the square that it is shown
    mean: Triple = (0.485, 0.456, 0.406)  # those of ImageNet, as in torchvision's own weights
    std: Triple = (0.229, 0.224, 0.225)


class TowerRegionsSource(_Found):
    """A CLIP tower with a head for boxes."""

    kind: Literal["tower"]
    folder: str  # of an open_clip model, relative to this one
    weights_digest: str  # of that folder: the features of another tower would mean nothing
    box_head_width: Annotated[int, Field(ge=1)]


class ColumnRegions(_Source):
    """Columns of the source."""

    kind: Literal["columns"]


RegionSource = DetectorRegions | TowerRegionsSource | ColumnRegions
_PARSER: TypeAdapter[RegionSource] = TypeAdapter(Annotated[RegionSource, Field(discriminator="kind")])


def read_region_source(folder: Path) -> RegionSource:
    """Reads `regions.json`.

    Raises:
        WeightsError: it is absent, or does not say where regions come from.
    """
    path = folder / REGIONS_FILE
    try:
        return _PARSER.validate_python(read_json(path))
    except ValidationError as error:
        raise WeightsError(
            describe_validation(error, what=f"weights: {path}"),
            remedy="Write kind detector, tower or columns, and what belongs to it.",
        ) from error


def region_preprocessing(folder: Path) -> Preprocessing | None:
    """What the pixels are that regions are found in; None: no pixels, regions are columns of the source.

    Raises:
        WeightsError: a configuration file is absent, or asks for what vlmflow does not do.
    """
    source = read_region_source(folder)
    if isinstance(source, ColumnRegions):
        return None
    if isinstance(source, DetectorRegions):
        return Preprocessing(source.size, "bilinear", source.mean, source.std)
    config = tower_config(folder, source)
    return read_preprocessing(Path(config.path or ""), config)


def tower_config(folder: Path, source: TowerRegionsSource) -> ModelConfig:
    """The CLIP that a tower source stands on."""
    return ModelConfig(family="open_clip", path=str((folder / source.folder).resolve()))


def load_finder(folder: Path, device: str, dtype: torch.dtype) -> RegionFinder | None:
    """Loads what finds the regions; None: they are columns of the source.

    Raises:
        WeightsError: weights are absent, do not fit, or are not those that the model was trained on.
    """
    source = read_region_source(folder)
    if isinstance(source, ColumnRegions):
        return None
    if isinstance(source, DetectorRegions):
        from vlmflow.models.vilbert.detector import load_detector_regions

        return load_detector_regions(folder / DETECTOR_FILE, source, device)
    from vlmflow.models.vilbert.tower import load_tower_regions

    config = tower_config(folder, source)
    clip = Path(config.path or "")
    if weights_digest(clip, "open_clip") != source.weights_digest:
        raise WeightsError(
            f"weights: {folder} stands on the tower of {source.folder}, which holds other weights than those",
            remedy="Put both folders of one release side by side.",
        )
    return load_tower_regions(clip, config, folder / BOX_HEAD_FILE, source, device, dtype)
