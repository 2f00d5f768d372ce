"""Large images resized with torch, where there is a hurry, against Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tests.images import Array, scene
from vlmflow.imaging import resizing
from vlmflow.imaging.pixels import VIEWS, render
from vlmflow.imaging.resizing import Interpolation, Resizer, hurried

OF_IMAGE: Sequence[str] = VIEWS[:3]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """The hardest case: neighbours have nothing in common, and all levels occur."""
    levels = np.random.default_rng(width).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(levels.squeeze())


def rendered(image: Image.Image, size: int, interpolation: Interpolation) -> dict[str, Array]:
    return {name: view.astype(int) for name, view in render(Resizer(image), size, interpolation, OF_IMAGE)}


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The width and height of all that torch makes from here on."""
    made: list[tuple[int, int]] = []
    resize = Resizer._by_torch

    def recorded(self: Resizer, size: int, how: Interpolation, across: tuple[int, int], down: tuple[int, int]) -> Array:
        made.append((across[0], down[0]))
        return resize(self, size, how, across, down)

    monkeypatch.setattr(Resizer, "_by_torch", recorded)
    return made


@pytest.mark.parametrize("picture", [scene, noise])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((640, 480), 384),
        ((480, 719), 224),
        ((1601, 1203), 336),
        ((513, 512), 512),
        ((700, 400), 448),
        ((2900, 100), 30),
    ],
)
def test_levels_are_those_of_pillow_but_for_some_that_differ_by_one_or_two(
    picture: object, interpolation: Interpolation, shape: tuple[int, int], size: int, by_torch: list[tuple[int, int]]
) -> None:
    image = noise(*shape) if picture is noise else scene(3, *shape)
    expected = rendered(image, size, interpolation)
    assert not by_torch
    with hurried():
        found = rendered(image, size, interpolation)
    assert by_torch[0] == (size, size)
    assert list(found) == list(expected)
    for name, view in found.items():
        assert view.shape == (size, size, 3)
        difference = np.abs(view - expected[name])
        assert difference.max() <= 2, name
        assert difference.mean() <= (0.1 if interpolation == "bilinear" else 0.01), name


def test_the_middle_is_cut_out_of_the_whole_unless_that_is_more_than_two_squares(
    by_torch: list[tuple[int, int]],
) -> None:
    with hurried():
        render(Resizer(noise(600, 900)), 200, "bicubic", ["center"])
        render(Resizer(noise(900, 600)), 200, "bicubic", ["center"])
        render(Resizer(noise(900, 450)), 200, "bicubic", ["center", "tiles"])
    assert by_torch == [(200, 300), (300, 200)]


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (noise(511, 512), 64),  # small
        (noise(600, 600, "L"), 64),
        (noise(8192, 40), 64),  # averaged down first
    ],
)
def test_others_stay_with_pillow(image: Image.Image, size: int, by_torch: list[tuple[int, int]]) -> None:
    expected = Resizer(image)(size, "bicubic", None)
    with hurried():
        assert np.array_equal(Resizer(image)(size, "bicubic", None), expected)
    assert not by_torch


def test_giants_stay_with_pillow(by_torch: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "_MOST_PIXELS", 600 * 600 - 1)
    with hurried():
        Resizer(noise(600, 600))(64, "bicubic", None)
    assert not by_torch


@pytest.mark.parametrize(("width", "num_taken"), [(600, 0), (2200, 1)], ids=["in-one-piece", "in-pieces"])
def test_pixels_are_taken_out_of_the_image_only_where_it_lies_in_pieces_and_once_for_all_squares(
    monkeypatch: pytest.MonkeyPatch, width: int, num_taken: int
) -> None:
    taken: list[object] = []
    interface = Image.Image.__array_interface__.fget  # type: ignore[attr-defined]

    def recorded(image: Image.Image) -> object:
        taken.append(image)
        return interface(image)

    monkeypatch.setattr(Image.Image, "__array_interface__", property(recorded))
    image = scene(0, width, 2000)  # Pillow's pieces are of 16 MB
    with hurried():
        one = Resizer(image)
        views = [one(size, "bicubic", None) for size in (64, 96, 32)]
    assert taken == [image] * num_taken
    monkeypatch.undo()
    for view in views:
        resized = image.resize(view.shape[:2], Image.Resampling.BICUBIC)
        assert np.abs(view.astype(int) - np.asarray(resized)).max() <= 2


def test_views_do_not_change_with_what_was_made_before_of_the_image() -> None:
    image = noise(600, 700)
    with hurried():
        views = [Resizer(image)(64, "bicubic", None)]
        one = Resizer(image)
        views += [one(size, "bicubic", None) for size in (96, 64)]
    views.pop(1)
    assert np.array_equal(views[0], views[1])
