"""What a model wants to be shown, read from the configuration files of its folder without building it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never, cast

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.families import Family, family_of
from vlmflow.models.processors import CLIP_MEAN, CLIP_STD, class_of, values_of_timm, with_defaults
from vlmflow.models.weights import check_model_type, read_json, read_open_clip_model, section_of
from vlmflow.paths import is_file

Interpolation = Literal["bicubic", "bilinear"]

# Of vision-language models without a size of their own: two tiles of the usual 384 each way.
_PROMPTED_SIDE, _MAX_PROMPTED_SIDE = 768, 1024
# A longest side that is longer counts the pixels of a whole image.
_MAX_SIDE = 10_000
# What their files call the size is that of a patch: they cut images of any size into these.
_SIZED_BY_PATCH = ("InklingImageProcessor", "Inkling2ImageProcessor")
_PILLOW_FILTERS: dict[object, Interpolation] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """Pixels to the model's input: resized to a square, scaled to [0, 1], mean taken off, divided by std.

    ``is_bgr``: the channels are turned round first, to blue, green, red.
    """

    size: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_bgr: bool = False

    def describe(self) -> str:
        """One line, equal for equal preprocessing."""
        parts = [self.size, self.interpolation, self.mean, self.std]
        return json.dumps([*parts, "bgr"] if self.is_bgr else parts)


def read_preprocessing(folder: Path, config: ModelConfig) -> Preprocessing:
    """Reads the preprocessing of a model.

    Raises:
        WeightsError: a configuration file is absent, is of a model that the family does not read, or asks for what
            vlmflow does not do.
    """
    check_model_type(folder, config.family)
    preprocessing = _read(folder, config)
    if preprocessing.is_bgr and config.family != "image_classification":
        raise WeightsError(
            f"weights: {folder} asks for channels in the order blue, green, red, which is for classifiers alone",
            remedy="Set do_flip_channel_order to false.",
        )
    if not all(0 < number < math.inf for number in preprocessing.std):
        raise WeightsError(
            f"weights: {folder} divides the channels by {preprocessing.std}, which gives no numbers",
            remedy="Write the standard deviations that the model was trained with.",
        )
    return preprocessing


def _read(folder: Path, config: ModelConfig) -> Preprocessing:
    family = family_of(config.family)
    match family.reader:
        case "open_clip":
            return _read_open_clip(folder, config.architecture)
        case "chat":
            return Preprocessing(_prompted_side(folder), "bicubic", CLIP_MEAN, CLIP_STD)
        case "align":
            return _read_align(folder)
        case "blip":
            return _read_blip(folder)
        case "processor":
            return _read_processor(folder, family)
        case "classifier":
            return _read_classifier(folder, family)
        case _:
            assert_never(family.reader)


def _read_open_clip(folder: Path, architecture: str | None) -> Preprocessing:
    model = read_open_clip_model(folder, architecture)
    path = folder / "open_clip_config.json"
    if is_file(path):
        values = section_of(read_json(path), "preprocess_cfg", path)
    else:
        values = _pretrained_preprocessing(architecture or "")
    size = _square(section_of(model, "vision_cfg", path).get("image_size", 224), path)
    # open_clip takes "random" as bicubic outside training.
    interpolation: Interpolation = "bilinear" if values.get("interpolation") == "bilinear" else "bicubic"
    mean, std = values.get("mean") or CLIP_MEAN, values.get("std") or CLIP_STD
    return Preprocessing(size, interpolation, _triple(mean, path), _triple(std, path))


def _pretrained_preprocessing(architecture: str) -> dict[str, Any]:
    """What open_clip's own published weights of an architecture agree on."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(architecture)
    configs = [get_pretrained_cfg(architecture, tag) for tag in tags]
    keys = ("mean", "std", "interpolation")
    different = {json.dumps([config.get(key) for key in keys]) for config in configs}
    if len(different) != 1:
        raise WeightsError(
            f"architecture {architecture}: its published weights do not agree on one preprocessing",
            remedy="Put the open_clip_config.json of these weights into the folder.",
        )
    return {key: configs[0].get(key) for key in keys}


def _read_blip(folder: Path) -> Preprocessing:
    values, path = _processor_values(folder)
    values, config = with_defaults(values, "BlipImageProcessor", path), folder / "config.json"
    image_size = section_of(read_json(config), "vision_config", config).get("image_size", 384)
    side = _square(values["size"], path)
    if side != image_size:
        raise WeightsError(
            f"weights: {path} says size {side}, but config.json says {image_size}", remedy="Make the two agree."
        )
    if values["do_center_crop"]:
        raise WeightsError(f"weights: {path} asks for a centre crop", remedy="Set do_center_crop to false.")
    return _plain(values, side, path)


def _read_processor(folder: Path, family: Family) -> Preprocessing:
    """That of transformers' image processors: a square; of a crop of the shortest side its side.

    The whole image is squashed to it where they would show its middle: moderation must not overlook the ends.
    """
    values, path = _processor_values(folder)
    has_patches = class_of(values) == "Siglip2ImageProcessor" and "siglip2" in family.model_types
    if has_patches:
        values = _of_patches(folder, values, path)
    values = with_defaults(values, family.processor, path)
    preprocessing = _squashed(values, path)
    if values.get("size_divisor") is not None:
        preprocessing = replace(preprocessing, size=_divided(preprocessing.size, values["size_divisor"], path))
    if family.image_section is not None and not has_patches:
        _check_size(folder, family.image_section, preprocessing.size)
    return preprocessing


def _of_patches(folder: Path, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Values of a SigLIP processor that shows the square that a NaFlex processor makes of a square.

    It resizes images of any shape so that they have no more than so many patches, and those of a square are a square.
    """
    side, most = values.get("patch_size", 16), values.get("max_num_patches", 256)
    config = folder / "config.json"
    expected = section_of(read_json(config), "vision_config", config).get("patch_size", 16)
    if not (isinstance(side, int) and isinstance(most, int) and side == expected and side > 0 and most > 0):
        raise WeightsError(
            f"weights: {path} cuts images into at most {most!r} patches of {side!r} pixels a side, but config.json "
            f"says {expected!r} pixels",
            remedy="Copy preprocessor_config.json and config.json of one model.",
        )
    square = {"size": side * math.isqrt(most), "image_processor_type": "SiglipImageProcessor"}
    return {"resample": 2} | values | square


def _read_classifier(folder: Path, family: Family) -> Preprocessing:
    """As others; of timm's models, which have no file of a processor, as in transformers by their configuration."""
    path = folder / "config.json"
    pretrained = section_of(read_json(path), "pretrained_cfg", path) if is_file(path) else {}
    if not pretrained:
        return _read_processor(folder, family)
    return _squashed(with_defaults(values_of_timm(pretrained), family.processor, path), path)


def _read_align(folder: Path) -> Preprocessing:
    """That of ALIGN: the side of its crop; [0, 255] becomes [-1, 1] by an offset, which is a mean and std of 0.5.

    Its processor resizes to 346 and cuts 289 out of the middle; here 289 show the whole image.
    """
    values, path = _processor_values(folder)
    values = with_defaults(values, "EfficientNetImageProcessor", path)
    scale = _rescale_factor(values, path)
    if values["rescale_offset"] and not values["do_normalize"] and abs(scale * 127.5 - 1) < 1e-6:
        values |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5}
        values |= {"rescale_offset": False}
    if values["rescale_offset"] or values["include_top"]:
        raise WeightsError(
            f"weights: {path} asks for more than an offset to [-1, 1]",
            remedy="Use rescale_factor 1/127.5, rescale_offset true, do_normalize false, include_top false.",
        )
    return _squashed(values, path)


def _processor_values(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's values, and their file: of two that hold some, the one that transformers reads."""
    path = folder / "processor_config.json"  # newer checkpoints keep them there, with the rest of the processor's
    if is_file(path) and (values := section_of(read_json(path), "image_processor", path)):
        return values, path
    path = folder / "preprocessor_config.json"
    return read_json(path), path


def _check_size(folder: Path, section: str, side: int) -> None:
    path = folder / "config.json"
    values = read_json(path)
    # The first CLIPs say all of it a second time, under another name, which transformers prefers.
    name = section if values.get(f"{section}_dict") is None else f"{section}_dict"
    # All these models take 224 pixels where the configuration does not say, but for one.
    expected = section_of(values, name, path).get("image_size", 448 if values.get("model_type") == "tipsv2" else 224)
    if expected not in (side, [side, side]):
        raise WeightsError(
            f"weights: {folder} shows its model {side} pixels, but config.json says {expected}",
            remedy="Copy preprocessor_config.json and config.json of one model.",
        )


def _squashed(values: dict[str, Any], path: Path) -> Preprocessing:
    size = values.get("crop_size") if values["do_center_crop"] else None
    return _plain(values, _square(size or values["size"], path, by_short_side=True), path)


def _prompted_side(folder: Path) -> int:
    """The square that a vision-language model is shown: its processor's, else one that its processor resizes itself.

    Normalisation is the processor's alone: the digest of the weights covers its file.
    """
    values, _ = _processor_values(folder)
    size = values.get("crop_size") if values.get("do_center_crop") else None
    size = size or values.get("size")
    if isinstance(size, dict):
        longest = size.get("longest_edge")
        counts_pixels = isinstance(longest, int) and longest > _MAX_SIDE
        size = None if counts_pixels else size.get("height", size.get("shortest_edge"))
    if class_of(values) in _SIZED_BY_PATCH:
        size = None
    return size if isinstance(size, int) and 0 < size <= _MAX_PROMPTED_SIDE else _PROMPTED_SIDE


def _plain(values: dict[str, Any], side: int, path: Path) -> Preprocessing:
    resample = values["resample"]
    interpolation = _PILLOW_FILTERS.get(resample) if isinstance(resample, int) else None
    rescale = _rescale_factor(values, path)
    plain = values["do_resize"] and values["do_rescale"] and not values["rescale_offset"] and not values["include_top"]
    if interpolation is None or abs(rescale * 255 - 1) > 1e-6 or not plain:
        raise WeightsError(
            f"weights: {path} asks for preprocessing other than resize, 1/255, mean and std",
            remedy="Use resample 2 or 3, rescale_factor 1/255, rescale_offset false and include_top false.",
        )
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else (0.0, 1.0)
    is_bgr = bool(values["do_flip_channel_order"])
    return Preprocessing(side, interpolation, _triple(mean, path), _triple(std, path), is_bgr)


def _square(written: object, path: Path, *, by_short_side: bool = False) -> int:
    """The side of a square: a number, two that are equal, or an object of height and width.

    Args:
        by_short_side: an object may give the shortest side instead, which the whole image is squashed to.
    """
    size, remedy = written, "Use a model of square images."
    if isinstance(written, dict):
        short = written.get("shortest_edge") if by_short_side else None
        size = [written.get("height"), written.get("width")] if short is None else short
        if not written.keys() >= {"height", "width"}:
            remedy = 'Write {"height": S, "width": S}, with S the side that the model takes: image_size of config.json.'
    sides = list(size) if isinstance(size, Sequence) else [size, size]
    if len(sides) == 2 and sides[0] == sides[1] and isinstance(sides[0], int) and sides[0] > 0:
        return sides[0]
    raise WeightsError(f"weights: {path}: image size {json.dumps(written)} is no square", remedy=remedy)


def _divided(side: int, divisor: object, path: Path) -> int:
    """The side that ViLT's processor makes of another: a multiple of the divisor, so that patches divide it."""
    if not isinstance(divisor, int) or not 0 < divisor <= side:
        raise WeightsError(
            f"weights: {path}: size_divisor {divisor!r} leaves nothing of an image of {side} pixels a side",
            remedy="Write the side of the model's patches: patch_size of config.json.",
        )
    return side // divisor * divisor


def _rescale_factor(values: dict[str, Any], path: Path) -> float:
    factor = values["rescale_factor"]
    if not isinstance(factor, int | float):
        raise WeightsError(
            f"weights: {path}: rescale_factor {factor!r} is no number", remedy="Write 1/255: 0.00392157."
        )
    return factor


def _triple(values: object, path: Path) -> tuple[float, float, float]:
    numbers = [values] * 3 if isinstance(values, int | float) else values
    if isinstance(numbers, Sequence) and len(numbers) == 3 and all(isinstance(n, int | float) for n in numbers):
        return cast("tuple[float, float, float]", tuple(float(cast(float, n)) for n in numbers))
    raise WeightsError(f"weights: {path}: mean or std {values} has not three numbers", remedy="Write one per channel.")
