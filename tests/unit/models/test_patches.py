"""Patches of pixels: the product against the convolution that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmflow.models.patches import Patches, PixelPatches
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing

SIZE = 42
PREPROCESSING = Preprocessing(
    SIZE, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def convolution(patch: int, *, bias: bool) -> nn.Conv2d:
    torch.manual_seed(patch)
    return nn.Conv2d(3, 32, patch, stride=patch, bias=bias).requires_grad_(False)


def expected(conv: nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
    inputs = PixelNormalizer(PREPROCESSING, "cpu", torch.float32)(pixels)
    found: torch.Tensor = conv(inputs).flatten(2).transpose(1, 2)
    return found


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [14, 6, 8])  # 588 values of a patch and 108, which are padded; 8 leaves two pixels
def test_pixels_as_they_are_give_what_normalised_ones_do(patch: int, bias: bool, pixels: torch.Tensor) -> None:
    conv = convolution(patch, bias=bias)
    normalize = PixelNormalizer(PREPROCESSING, "cpu", torch.float32)
    torch.testing.assert_close(PixelPatches(conv, normalize)(pixels), expected(conv, pixels), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(Patches(conv)(normalize(pixels)), expected(conv, pixels), atol=2e-5, rtol=1e-4)


def test_in_bfloat16_no_more_is_lost_than_by_rounding_normalised_pixels(pixels: torch.Tensor) -> None:
    lost = {"ours": 0.0, "theirs": 0.0}
    for patch in (14, 6):
        conv = convolution(patch, bias=True)
        exact, half = expected(conv, pixels), convolution(patch, bias=True).bfloat16()
        normalize = PixelNormalizer(PREPROCESSING, "cpu", torch.bfloat16)
        theirs = half(normalize(pixels)).flatten(2).transpose(1, 2)
        ours = PixelPatches(conv, normalize, torch.bfloat16)(pixels)
        assert ours.dtype == torch.bfloat16
        lost["theirs"] += (theirs.float() - exact).square().sum().item()
        lost["ours"] += (ours.float() - exact).square().sum().item()
    assert 0 < lost["ours"] <= lost["theirs"]


def test_pixels_of_another_size_are_refused(pixels: torch.Tensor) -> None:
    patches = PixelPatches(convolution(14, bias=True), PixelNormalizer(PREPROCESSING, "cpu", torch.float32))
    with pytest.raises(ValueError, match=r"pixels of \(4, 3, 28, 28\)"):
        patches(pixels[..., :28, :28])
