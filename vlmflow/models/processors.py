"""What the image processors of transformers take where a model's file leaves a value out.

Written down, because importing their classes imports torch, which the driver does without: a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmflow.errors import WeightsError

# OpenAI's CLIP and every model trained in its succession.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": 0.5, "image_std": 0.5}
_CROPPED = {"do_center_crop": True, "crop_size": 224}

# What all of them have in common; `resample` counts as Pillow does: 2 is bilinear, 3 bicubic.
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_center_crop": False,
    "do_flip_channel_order": False,
    "rescale_offset": False,
    "include_top": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "BeitImageProcessor": _HALF | {"resample": 3, "size": 224, "crop_size": 224},
    "BitImageProcessor": _CLIP | _CROPPED | {"resample": 3, "size": 224},
    "BlipImageProcessor": _CLIP | {"resample": 3, "size": 384},
    "ChineseCLIPImageProcessor": _CLIP | _CROPPED | {"resample": 3, "size": 224},
    "CLIPImageProcessor": _CLIP | _CROPPED | {"resample": 3, "size": 224},
    "ConvNextImageProcessor": _HALF | {"resample": 3, "size": 384},
    "DeiTImageProcessor": _HALF | _CROPPED | {"resample": 3, "size": 256},
    "EfficientNetImageProcessor": _HALF | {"resample": 3, "size": 346, "crop_size": 289, "include_top": True},
    "FlavaImageProcessor": _CLIP | _CROPPED | {"resample": 3, "size": 224},
    "LevitImageProcessor": _IMAGENET | _CROPPED | {"resample": 3, "size": 224},
    "MobileNetV1ImageProcessor": _HALF | _CROPPED | {"resample": 2, "size": 256},
    "MobileNetV2ImageProcessor": _HALF | _CROPPED | {"resample": 2, "size": 256},
    "MobileViTImageProcessor": {"resample": 3, "size": 224, "do_center_crop": True, "crop_size": 256}
    | {"do_flip_channel_order": True},
    "PerceiverImageProcessor": _IMAGENET | {"resample": 3, "size": 224, "do_center_crop": True, "crop_size": 256},
    "PoolFormerImageProcessor": _IMAGENET | _CROPPED | {"resample": 3, "size": 224},
    "PvtImageProcessor": _IMAGENET | {"resample": 3, "size": 224},
    "SegformerImageProcessor": _IMAGENET | {"resample": 2, "size": 512},
    "SiglipImageProcessor": _HALF | {"resample": 3, "size": 224},
    "Tipsv2ImageProcessor": {"resample": 2, "size": 448, "do_normalize": False},
    "TextNetImageProcessor": _IMAGENET | {"resample": 2, "size": 640, "crop_size": 224},
    "ViTImageProcessor": _HALF | {"resample": 2, "size": 224},
    "ViltImageProcessor": _HALF | {"resample": 3, "size": 384, "size_divisor": 32},
}
# What they do whatever the file says.
_ALWAYS: dict[str, dict[str, Any]] = {"MobileViTImageProcessor": {"do_normalize": False}}
# What one of them alone knows: the others pass over it, whatever the file says.
_OF_ONE_CLASS = {"do_flip_channel_order": "MobileViTImageProcessor", "size_divisor": "ViltImageProcessor"}
# They do more with the pixels than their files say.
_REFUSED = ("ImageGPTImageProcessor", "PPLCNetImageProcessor", "Siglip2ImageProcessor")


def with_defaults(values: dict[str, Any], default_class: str | None, path: Path) -> dict[str, Any]:
    """The values of a processor's file, and those that it leaves out.

    Args:
        values: of the file; as in transformers null takes the place of a default, and means no for what can be done.
        default_class: the processor of the model's family, where the file names none.
        path: of the file.

    Raises:
        WeightsError: a value is left out that the processor's class does not settle, or the class does what vlmflow
            does not.
    """
    name = class_of(values) or default_class
    if name in _REFUSED:
        raise WeightsError(
            f"weights: {path}: {name} does more than resize, 1/255, mean and std",
            remedy="Use a model with an image processor that does not.",
        )
    whole = _COMMON | DEFAULTS.get(name or "", {}) | values | _ALWAYS.get(name or "", {})
    needed = ["size", "resample", *(("image_mean", "image_std") if whole["do_normalize"] else ())]
    if name in DEFAULTS:
        whole |= {key: None for key, owner in _OF_ONE_CLASS.items() if owner != name}
    missing = [key for key in needed if whole.get(key) is None]
    if missing:
        raise WeightsError(
            f"weights: {path} says nothing of {', '.join(missing)}, and what "
            f"{name or 'a processor that it does not name'} takes then is not known",
            remedy="Write them into the file, as the model was trained.",
        )
    return whole


def values_of_timm(pretrained: dict[str, Any]) -> dict[str, Any]:
    """What timm's own configuration says of an image, in the words of transformers.

    Args:
        pretrained: ``pretrained_cfg`` of its config.json; what it leaves out is as in timm.
    """
    size, name = pretrained.get("input_size") or (3, 224, 224), str(pretrained.get("interpolation") or "bicubic")
    return {
        "size": size[1:] if isinstance(size, list | tuple) else size,
        "resample": {"bilinear": 2, "bicubic": 3}.get(name, name),
        "image_mean": pretrained.get("mean") or _IMAGENET["image_mean"],
        "image_std": pretrained.get("std") or _IMAGENET["image_std"],
    }


def class_of(values: dict[str, Any]) -> str | None:
    """The class that a file names; older files name it otherwise, newer ones with what it computes with."""
    found = values.get("image_processor_type") or values.get("feature_extractor_type")
    if not isinstance(found, str):
        return None
    name = found.replace("FeatureExtractor", "ImageProcessor")
    return name.removesuffix("Fast").removesuffix("Pil")
