"""Views: the whole image squashed, and the centre crop that CLIP's own preprocessing takes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from tests.images import encode, scene
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode, merge_requests

LIMITS = ImageLimits()


def views_of(data: bytes, size: int, interpolation: Literal["bicubic", "bilinear"] = "bicubic") -> dict[str, object]:
    request = PixelRequest(size, interpolation, ("squash", "center"))
    return dict(decode(data, [request], LIMITS).pixels[request.key])


@pytest.mark.parametrize("shape", [(96, 64), (64, 97), (301, 77), (50, 333), (640, 480), (65, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_equal_the_reference_preprocessing(
    shape: tuple[int, int], interpolation: Literal["bicubic", "bilinear"]
) -> None:
    image = scene(3, *shape)
    mode = InterpolationMode(interpolation)
    views = views_of(encode(image, "PNG"), 48, interpolation)
    squash = np.asarray(resize(image, [48, 48], mode))
    center = np.asarray(center_crop(resize(image, 48, mode), [48, 48])).astype(int)
    assert np.array_equal(views["squash"], squash)
    assert np.abs(views["center"] - center).max() <= 1  # torchvision resizes the whole, we the part that is shown


def test_a_square_image_has_no_centre_crop_of_its_own() -> None:
    assert list(views_of(encode(scene(0, 80, 80), "PNG"), 48)) == ["squash"]


def test_a_very_long_image_is_cropped_without_being_enlarged_whole() -> None:
    data = encode(scene(0, 60_000, 2), "PNG")
    views = views_of(data, 224)  # resized as a whole it would be 6.7 million pixels wide
    assert {name: view.shape for name, view in views.items()} == {"squash": (224, 224, 3), "center": (224, 224, 3)}


def test_an_image_of_one_pixel_fills_its_view() -> None:
    (pixels,) = views_of(encode(scene(0, 8, 8).crop((0, 0, 1, 1)), "PNG"), 32).values()
    assert pixels.shape == (32, 32, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1


def test_requests_with_one_key_are_merged_in_order() -> None:
    merged = merge_requests(
        [
            PixelRequest(224, "bicubic", ("squash",)),
            PixelRequest(64, "bicubic", ("squash",)),
            PixelRequest(224, "bicubic", ("squash", "center")),
        ]
    )
    assert merged == [PixelRequest(224, "bicubic", ("squash", "center")), PixelRequest(64, "bicubic", ("squash",))]


def test_an_unknown_view_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="view tile is unknown"):
        decode(encode(scene(), "PNG"), [PixelRequest(32, "bicubic", ("tile",))], LIMITS)
