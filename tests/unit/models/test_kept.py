"""Features are found by pixels: all of them, whatever the order, and never those of another image."""

from __future__ import annotations

import pytest
import torch

from tests.models import random_pixels
from vlmflow.models.kept import KeptFeatures, _are_equal, _are_equal_on_device, _rows
from vlmflow.models.towers import SharedTower


class Means:
    """(N, 3, S, S) -> (N, 1); remembers how many rows it was given, call by call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(pixels))
        return pixels.float().mean(dim=(1, 2, 3))[:, None]


def expected(pixels: torch.Tensor) -> torch.Tensor:
    return Means()(pixels)


@pytest.mark.parametrize(
    "rows",
    [[0, 2, 5], [5, 2, 0], [3], [1, 1, 4, 1], list(range(7)), [6, 5, 4, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]],
)
@pytest.mark.parametrize("keeps_all", [True, False])
def test_images_that_were_there_are_not_computed_again(rows: list[int], keeps_all: bool) -> None:
    means, pixels = Means(), random_pixels(7)
    kept = KeptFeatures(means, keeps_all=keeps_all)
    assert torch.equal(kept.of(pixels), expected(pixels))
    assert torch.equal(kept.of(pixels[torch.tensor(rows)]), expected(pixels[torch.tensor(rows)]))
    assert means.rows == [7]


def test_what_came_in_pieces_is_found_as_a_whole_and_what_is_new_is_computed_alone() -> None:
    means, pixels = Means(), random_pixels(9)
    kept = KeptFeatures(means, keeps_all=True)
    kept.of(pixels[:3])
    kept.of(pixels[3:5])
    assert torch.equal(kept.of(pixels[:5]), expected(pixels[:5]))
    assert means.rows == [3, 2]
    mixed = pixels[torch.tensor([8, 4, 0, 7])]
    assert torch.equal(kept.of(mixed), expected(mixed))
    assert means.rows == [3, 2, 2]
    assert torch.equal(kept.of(pixels[5:9]), expected(pixels[5:9]))
    assert means.rows == [3, 2, 2, 2], "two of the four had been there"


def test_of_the_last_call_alone_images_are_found_all_or_none() -> None:
    means, pixels = Means(), random_pixels(6)
    kept = KeptFeatures(means, keeps_all=False)
    kept.of(pixels[:3])
    kept.of(pixels[3:])
    kept.of(pixels[3:5])
    assert means.rows == [3, 3]
    assert torch.equal(kept.of(pixels[2:5]), expected(pixels[2:5]))
    assert means.rows == [3, 3, 3]


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 15, 16), (2, 31, 31)])
def test_an_image_that_differs_in_one_byte_is_another(place: tuple[int, int, int]) -> None:
    """Whether that byte is one of those that images are looked up by or not."""
    means, pixels = Means(), random_pixels(3)
    kept = KeptFeatures(means, keeps_all=True)
    kept.of(pixels)
    other = pixels.clone()
    other[1][place] ^= 1
    assert torch.equal(kept.of(other), expected(other))
    assert means.rows == [3, 1]


def test_images_that_look_alike_where_they_are_looked_up_keep_their_own_features() -> None:
    white = torch.full((4, 3, 64, 64), 255, dtype=torch.uint8)
    for row in range(4):
        white[row, :, 0, row] = 0  # no place that is looked at
    means = Means()
    kept = KeptFeatures(means, keeps_all=True)
    kept.of(white)
    reordered = white.flip(0)
    assert torch.equal(kept.of(reordered), expected(white).flip(0))


def test_pixels_of_another_size_are_none_of_those() -> None:
    means = Means()
    kept = KeptFeatures(means, keeps_all=True)
    kept.of(torch.zeros((2, 3, 32, 32), dtype=torch.uint8))
    kept.of(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))
    kept.of(torch.zeros((2, 3, 32, 32), dtype=torch.float32))
    assert means.rows == [2, 2, 2]


def test_a_tower_keeps_nothing_for_one_model_or_behind_the_batch() -> None:
    means, pixels = Means(), random_pixels(3)
    tower = SharedTower(means, keeps_batch=True)
    tower.num_users = 1
    tower(pixels)
    tower(pixels)
    assert means.rows == [3, 3]
    tower.num_users = 2
    tower(pixels)
    tower(pixels)
    assert means.rows == [3, 3, 3]
    tower.forget()
    tower(pixels)
    assert means.rows == [3, 3, 3, 3]
    assert tower.num_passes == 4


def test_no_images_have_no_features() -> None:
    means = Means()
    kept = KeptFeatures(means, keeps_all=True)
    kept.of(random_pixels(2))
    assert kept.of(random_pixels(2)[:0]).shape == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 64, 150])
def test_a_device_compares_as_a_processor_does(count: int) -> None:
    first = random_pixels(150, size=16)
    second = first.flip(0).clone()
    second[::3, 1, 5, 7] ^= 1
    pairs = [(row, 149 - row) for row in range(count)]
    expected = [row % 3 != 0 for row in range(count)]
    assert _are_equal(first, second, pairs) == expected
    assert _are_equal_on_device(_rows(first), _rows(second), pairs) == expected
