"""The packed layers of a CLIP image tower against open_clip's own, whatever the activation and the scale of layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import nn

from vlmflow.models.clip_packed import pack_image_tower
from vlmflow.models.packed import PackedTower

TEXT = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)


def tower(**options: Any) -> CLIP:
    quick = options.pop("quick_gelu", False)
    torch.manual_seed(options.pop("seed", 0))
    vision = CLIPVisionCfg(image_size=32, patch_size=8, width=32, head_width=16, layers=2, **options)
    model = CLIP(24, vision, TEXT, quick_gelu=quick).eval().requires_grad_(False)
    for module in model.modules():  # as trained: a norm scales and shifts
        if isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.5, 2.0)
            module.bias.normal_(0.0, 0.3)
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_bias.normal_(0.0, 0.1)
    return model


def in_bfloat16(model: CLIP) -> CLIP:
    """As open_clip builds it with ``precision="bf16"``."""
    for module in model.modules():
        if type(module) is LayerNorm:
            module.__class__ = LayerNormFp32
    convert_weights_to_lp(model, torch.bfloat16)
    return model


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"ls_init_value": 0.3}, {"attentional_pool": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_open_clip(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tower(**options).to(dtype)
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    with torch.inference_mode():
        expected = model.encode_image(images)
        assert pack_image_tower(model)
        found = model.encode_image(images)
    (packed,) = model.visual.transformer.resblocks
    assert isinstance(packed, PackedTower)
    cosine = torch.nn.functional.cosine_similarity(found.float(), expected.float())
    assert cosine.min() > (0.999999 if dtype == torch.float32 else 0.999)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_products_alone_are_in_bfloat16() -> None:
    """What is added up from layer to layer would lose most: the vectors are nearer than those of a bfloat16 tower."""
    model = tower()
    half, ours = copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = model.encode_image(images)
        theirs = half.encode_image(images.bfloat16()).float()
        assert pack_image_tower(ours, torch.bfloat16)
        found = ours.encode_image(images)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected), "nothing was computed in bfloat16"
    assert (found - expected).norm() < 0.7 * (theirs - expected).norm()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_carried_in_bfloat16_it_loses_no_more_than_open_clips_own(quick_gelu: bool) -> None:
    """As on CUDA; over towers of many weights, since what is lost of one is chance."""
    lost = {"theirs": 0.0, "ours": 0.0}
    for seed in range(8):
        model = tower(quick_gelu=quick_gelu, seed=seed)
        theirs = in_bfloat16(copy.deepcopy(model))
        ours = copy.deepcopy(model)
        images = torch.randn(8, 3, 32, 32)
        with torch.inference_mode():
            expected = model.encode_image(images)
            assert pack_image_tower(ours, torch.bfloat16, carried=torch.bfloat16)
            in_bfloat16(ours)
            for name, found in (("theirs", theirs), ("ours", ours)):
                lost[name] += (found.encode_image(images.bfloat16()).float() - expected).square().sum().item()
    assert 0 < lost["ours"] <= 1.05 * lost["theirs"]


def test_a_tower_of_another_kind_stays_as_it_is() -> None:
    class Other(torch.nn.Module):
        visual = torch.nn.Linear(2, 2)

    assert not pack_image_tower(Other())
