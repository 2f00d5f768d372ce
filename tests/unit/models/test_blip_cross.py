"""Attention to images without keys and values of theirs, against that of transformers, which makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention

from vlmflow.models.blip_fast import cross
from vlmflow.models.blip_fast.cross import CrossAttention, attend_to_features

HEADS, WIDTH, IMAGE_WIDTH = 3, 24, 40


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def layer() -> BlipTextAttention:
    """Whose weights and biases all matter."""
    config = BlipTextConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, encoder_hidden_size=IMAGE_WIDTH, is_decoder=True
    )
    layer = BlipTextAttention(config, is_cross_attention=True, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(0)
    for weights in layer.parameters():
        weights.copy_(torch.randn(weights.shape, generator=generator) / 3)
    return layer


def given(num_images: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States of texts, and features of images."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_images, num_tokens, WIDTH, generator=generator), torch.randn(
        num_images, 17, IMAGE_WIDTH, generator=generator
    )


@pytest.mark.parametrize(("num_images", "num_tokens"), [(1, 1), (3, 1), (4, 5), (2, 32), (2, 33), (1, 70)])
def test_it_gives_what_keys_and_values_do(layer: BlipTextAttention, num_images: int, num_tokens: int) -> None:
    states, features = given(num_images, num_tokens)
    expected = layer(states, encoder_hidden_states=features)[0]
    ours = CrossAttention(layer, HEADS, None)(states, features)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    others = CrossAttention(layer, HEADS, None)(states, features.flip(1, 2))
    assert not torch.allclose(others, expected, atol=0.1)


def test_biases_count(layer: BlipTextAttention) -> None:
    """That of the values comes out; that of the keys moves all scores alike."""
    states, features = given(3, 4)
    before = CrossAttention(layer, HEADS, None)(states, features)
    layer.self.key.bias += 1
    torch.testing.assert_close(CrossAttention(layer, HEADS, None)(states, features), before, atol=1e-5, rtol=1e-5)
    layer.self.value.bias += torch.linspace(-1, 1, WIDTH)
    moved = CrossAttention(layer, HEADS, None)(states, features)
    assert not torch.allclose(moved, before, atol=0.1)
    torch.testing.assert_close(moved, layer(states, encoder_hidden_states=features)[0], atol=1e-5, rtol=1e-5)


def test_features_in_bfloat16_cost_their_rounding(layer: BlipTextAttention) -> None:
    states, features = given(3, 4)
    expected = layer(states, encoder_hidden_states=features)[0]
    ours = CrossAttention(layer, HEADS, torch.bfloat16)(states, features.bfloat16())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0)


def test_means_are_of_each_image_alone() -> None:
    queries, features = torch.zeros(2, 3 * 2, 8), torch.randn(3, 5, 8)
    means = attend_to_features(queries, features)  # all tokens alike
    assert means.shape == queries.shape
    expected = features.mean(dim=1).repeat_interleave(2, dim=0).expand(2, -1, -1)
    torch.testing.assert_close(means, expected)


def test_what_is_held_is_bounded(layer: BlipTextAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        sizes.append(queries.shape[1] // len(features))
        return attend_to_features(queries, features)

    monkeypatch.setattr(cross, "attend_to_features", counted)
    CrossAttention(layer, HEADS, None)(*given(2, 70))
    assert sizes == [32, 32, 6]
