"""Files that leave values out: a model is shown what transformers would show it, or is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tests.models import IMAGE_SIZE, make_captioner, random_pixels, write_json
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing, read_preprocessing
from vlmflow.models.processors import _COMMON, _REFUSED, DEFAULTS

WHOLE = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}
CROPPED = {"do_center_crop": True, "crop_size": IMAGE_SIZE, "size": {"shortest_edge": IMAGE_SIZE}}
MOBILE = CROPPED | {"image_processor_type": "MobileViTImageProcessor", "resample": 2, "rescale_factor": 1 / 255}


def read(folder: Path, values: dict[str, Any], family: str = "image_classification") -> Preprocessing:
    write_json(folder / "preprocessor_config.json", values)
    return read_preprocessing(folder, ModelConfig(family=family, path=str(folder)))


@pytest.mark.parametrize(
    "values",
    [
        WHOLE,
        WHOLE | {"do_flip_channel_order": True, "size_divisor": 24},
        MOBILE | {"do_flip_channel_order": True},
        MOBILE,
        MOBILE | {"do_flip_channel_order": False},
        MOBILE | {"do_normalize": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3},
        {"image_processor_type": "ViTImageProcessor", "size": IMAGE_SIZE},
        {"image_processor_type": "ViTImageProcessorFast", "size": IMAGE_SIZE, "do_center_crop": None},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": IMAGE_SIZE, "image_mean": [0.4, 0.5, 0.6]},
        WHOLE | {"do_normalize": False},
        WHOLE | {"do_normalize": None},
        CROPPED | {"image_processor_type": "LevitImageProcessor"},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": IMAGE_SIZE},
    ],
)
def test_a_classifier_is_shown_what_transformers_shows_it(tmp_path: Path, values: dict[str, Any]) -> None:
    preprocessing = read(tmp_path, values)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert preprocessing.size == IMAGE_SIZE
    assert {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation] == processor.resample
    pixels = random_pixels(2)
    # The images have the size already: what is left is what happens to the numbers.
    as_given = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    expected = processor(list(pixels), **as_given)["pixel_values"]
    found = PixelNormalizer(preprocessing, "cpu", torch.float32)(pixels)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["image_classification", "blip_itm", "vilt", "flava", "dual_encoder"])
def test_a_processor_saved_whole_is_read_from_the_file_that_transformers_reads(tmp_path: Path, family: str) -> None:
    """Saved with its tokenizer, an image processor lies in `processor_config.json`, beside an older file perhaps."""
    sections = {name: {"image_size": IMAGE_SIZE} for name in ("vision_config", "image_config")}
    kind = {"flava": "flava", "blip_itm": "blip", "vilt": "vilt"}.get(family, "clip")
    write_json(tmp_path / "config.json", {"model_type": kind, **sections})
    write_json(tmp_path / "processor_config.json", {"processor_class": "BlipProcessor", "image_processor": WHOLE})
    config = ModelConfig(family=family, path=str(tmp_path))
    alone = read_preprocessing(tmp_path, config)
    assert (alone.size, alone.mean) == (IMAGE_SIZE, tuple(WHOLE["image_mean"]))
    assert read(tmp_path, WHOLE | {"image_mean": [0.5] * 3}, family) == alone
    assert alone.mean == tuple(AutoImageProcessor.from_pretrained(tmp_path).image_mean)

    write_json(tmp_path / "processor_config.json", {"processor_class": "BlipProcessor", "image_seq_length": 4})
    of_older = read_preprocessing(tmp_path, config)
    assert of_older.mean == (0.5, 0.5, 0.5) == tuple(AutoImageProcessor.from_pretrained(tmp_path).image_mean)


def test_defaults_are_those_of_transformers() -> None:
    for name, defaults in DEFAULTS.items():
        processor = getattr(transformers, name)()
        for key, value in (_COMMON | defaults).items():
            theirs = getattr(processor, key, None) or False
            if key in ("size", "crop_size"):
                assert value in (theirs.shortest_edge, theirs.height), (name, key)
            elif key in ("image_mean", "image_std"):
                assert np.allclose(value, theirs), (name, key)
            elif key != "do_normalize" or name != "MobileViTImageProcessor":  # it has no such step
                assert value == theirs, (name, key)


def test_processors_of_classifiers_are_known() -> None:
    named = {
        IMAGE_PROCESSOR_MAPPING_NAMES[kind]["torchvision"]
        for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if "torchvision" in IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {})
    }
    # One pads instead of cropping; one is of a judge.
    assert named - {"DonutImageProcessor", "Gemma3ImageProcessor"} <= {*DEFAULTS, *_REFUSED}


def test_whole_files_are_described_as_ever(tmp_path: Path) -> None:
    """Catalogs keep fingerprints of these lines: they move where pixels do, and nowhere else."""
    described = f'[{IMAGE_SIZE}, "bicubic", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]'
    assert read(tmp_path, WHOLE).describe() == described
    assert read(tmp_path, WHOLE | {"image_processor_type": "Another"}).describe() == described
    assert read(tmp_path, WHOLE | {"do_flip_channel_order": False}).describe() == described
    flipped = {"image_processor_type": "Another", "do_flip_channel_order": True}
    assert read(tmp_path, WHOLE | flipped).describe() != described


@pytest.mark.parametrize("absent", ["size", "resample", "image_mean", "image_std"])
@pytest.mark.parametrize("name", [None, "AnotherImageProcessor"])
def test_what_no_known_class_settles_is_refused(tmp_path: Path, absent: str, name: str | None) -> None:
    values = {key: value for key, value in WHOLE.items() if key != absent} | {"image_processor_type": name}
    with pytest.raises(WeightsError, match=f"says nothing of {absent}") as caught:
        read(tmp_path, values)
    assert (name or "does not name") in str(caught.value)
    with pytest.raises(WeightsError, match=f"says nothing of {absent}"):
        read(tmp_path, WHOLE | {absent: None})


@pytest.mark.parametrize(
    "change",
    [{"rescale_offset": True}, {"include_top": True}, {"image_processor_type": "EfficientNetImageProcessor"}],
)
def test_more_than_mean_and_std_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="asks for preprocessing other than") as caught:
        read(tmp_path, WHOLE | change)
    assert "include_top false" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": [3]}, "asks for preprocessing other than"),
        ({"size": 0}, "image size 0 is no square"),
        ({"size": {"height": -8, "width": -8}}, "is no square"),
        ({"image_std": [0.2, 0.0, 0.2]}, "divides the channels by"),
        ({"image_std": float("nan")}, "divides the channels by"),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read(tmp_path, WHOLE | change)


def test_processors_that_do_more_than_their_files_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="PPLCNetImageProcessor does more than"):
        read(tmp_path, WHOLE | {"image_processor_type": "PPLCNetImageProcessor"})


def test_a_family_settles_what_its_file_leaves_out(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "vilt"})
    assert read(tmp_path, {"size": 64}, "vilt").describe() == '[64, "bicubic", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]'
    folder = make_captioner(tmp_path)
    whole = read_preprocessing(folder, ModelConfig(family="blip_caption", path=str(folder)))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    assert read(folder, {"size": size}, "blip_caption") == whole
    edit_json(folder / "preprocessor_config.json", MOBILE | {"do_center_crop": False, "size": size})
    with pytest.raises(WeightsError, match="blue, green, red"):
        read_preprocessing(folder, ModelConfig(family="blip_caption", path=str(folder)))


@pytest.mark.parametrize(
    ("family", "size", "written"),
    [
        ("blip_caption", {"shortest_edge": IMAGE_SIZE}, rf'{{"shortest_edge": {IMAGE_SIZE}}}'),
        ("vilt", {"longest_edge": 640}, '{"longest_edge": 640}'),
        ("vilt", {"height": 64}, '{"height": 64}'),
    ],
)
def test_a_size_that_gives_no_square_is_named_as_it_is_written(
    tmp_path: Path, family: str, size: dict[str, int], written: str
) -> None:
    kind = family.partition("_")[0]
    write_json(tmp_path / "config.json", {"model_type": kind, "vision_config": {"image_size": IMAGE_SIZE}})
    with pytest.raises(WeightsError, match=re.escape(f"image size {written} is no square")) as caught:
        read(tmp_path, {"size": size}, family)
    assert '{"height": S, "width": S}' in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ({"size": {"height": 384, "width": 384}}, 384),
        ({"size": {"shortest_edge": 378, "longest_edge": 980}}, 378),
        ({"size": {"shortest_edge": 784, "longest_edge": 1_003_520}}, 768),  # pixels of an image, at least and at most
        ({"size": {"longest_edge": 1540}}, 768),
        ({"size": {"height": 40, "width": 40}, "image_processor_type": "InklingImageProcessor"}, 768),  # of a patch
        ({"size": {"height": 40, "width": 40}, "image_processor_type": "Inkling2ImageProcessorFast"}, 768),
    ],
)
def test_a_vision_language_model_is_shown_the_side_that_its_file_tells_of(
    values: dict[str, Any], side: int, tmp_path: Path
) -> None:
    """As the sides of images some files tell of numbers that are none: the model would see next to nothing."""
    write_json(tmp_path / "preprocessor_config.json", values)
    assert read_preprocessing(tmp_path, ModelConfig(family="vlm", path=str(tmp_path))).size == side
