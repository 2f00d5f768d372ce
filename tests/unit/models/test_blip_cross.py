"""Attention to images, with keys and values of theirs and without, against that of transformers, which makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention

from tests.fake_cuda import Operators, build, fake_mode
from vlmflow.models.attention import attend
from vlmflow.models.blip_fast import cross
from vlmflow.models.blip_fast.cross import CrossAttention, attend_to_features
from vlmflow.models.norm import Carried

HEADS, WIDTH, IMAGE_WIDTH = 3, 24, 40
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make() -> BlipTextAttention:
    config = BlipTextConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, encoder_hidden_size=IMAGE_WIDTH, is_decoder=True
    )
    return BlipTextAttention(config, is_cross_attention=True, layer_idx=0)


@pytest.fixture
def layer() -> BlipTextAttention:
    """Whose weights and biases all matter."""
    layer = make().eval()
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


def crossed(
    layer: BlipTextAttention, states: torch.Tensor, features: torch.Tensor, image_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What ours gives, from and to float32."""
    return CrossAttention(layer, HEADS, image_dtype)(Carried(states, states), features).states


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of a text at each call of what does without keys and values."""
    sizes: list[int] = []

    def counted(queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        sizes.append(queries.shape[1] // len(features))
        return attend_to_features(queries, features)

    monkeypatch.setattr(cross, "attend_to_features", counted)
    return sizes


@pytest.mark.parametrize("many", [0, 1000])
@pytest.mark.parametrize(("num_images", "num_tokens"), [(1, 1), (3, 1), (4, 5), (2, 32), (2, 33), (1, 70), (1, 130)])
def test_it_gives_what_keys_and_values_do(
    layer: BlipTextAttention, num_images: int, num_tokens: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross, "_MANY_IN_FLOAT32", many)
    states, features = given(num_images, num_tokens)
    expected = layer(states, encoder_hidden_states=features)[0]
    ours = crossed(layer, states, features)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    others = crossed(layer, states, features.flip(1, 2))
    assert not torch.allclose(others, expected, atol=0.1)


def test_biases_count(layer: BlipTextAttention) -> None:
    """That of the values comes out; that of the keys moves all scores alike."""
    states, features = given(3, 4)
    before = crossed(layer, states, features)
    layer.self.key.bias += 1
    torch.testing.assert_close(crossed(layer, states, features), before, atol=1e-5, rtol=1e-5)
    layer.self.value.bias += torch.linspace(-1, 1, WIDTH)
    moved = crossed(layer, states, features)
    assert not torch.allclose(moved, before, atol=0.1)
    torch.testing.assert_close(moved, layer(states, encoder_hidden_states=features)[0], atol=1e-5, rtol=1e-5)


def test_features_in_bfloat16_cost_their_rounding(layer: BlipTextAttention) -> None:
    states, features = given(3, 4)
    expected = layer(states, encoder_hidden_states=features)[0]
    ours = crossed(layer, states, features.bfloat16(), torch.bfloat16)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("is_new", [True, False])
def test_no_kernel_is_made_for_a_gpu_that_would_refuse_it(is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    monkeypatch.setitem(sys.modules, "vlmflow.models.triton_attention", SimpleNamespace(attend_to_features=None))
    monkeypatch.setattr(cross, "can_fuse", lambda *_: True)
    monkeypatch.setattr(cross, "attempt", lambda *_: attempts.append(1))
    monkeypatch.setattr(cross, "gpu_has_bfloat16", lambda: is_new)
    cross._gpu_is_new.cache_clear()
    attend_to_features(torch.randn(2, 3, 8).to(HALF), torch.randn(3, 5, 8).to(HALF))
    cross._gpu_is_new.cache_clear()
    assert len(attempts) == is_new


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_on_cuda_scores_are_not_rounded_where_the_kernel_cannot_be_used(dtype: torch.dtype) -> None:
    with torch.inference_mode(False), fake_mode(), Operators() as found:
        queries, features = (torch.empty(2, size, 8, device="cuda", dtype=dtype) for size in (2, 5))
        assert attend_to_features(queries, features).dtype == dtype
    assert found.dtypes["aten._softmax.default"] == {torch.float32}


def test_means_are_of_each_image_alone() -> None:
    queries, features = torch.zeros(2, 3 * 2, 8), torch.randn(3, 5, 8)
    means = attend_to_features(queries, features)  # all tokens alike
    assert means.shape == queries.shape
    expected = features.mean(dim=1).repeat_interleave(2, dim=0).expand(2, -1, -1)
    torch.testing.assert_close(means, expected)


def test_what_is_held_is_bounded(layer: BlipTextAttention, ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    by_keys: list[int] = []

    def counted(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        by_keys.append(queries.shape[2])
        return attend(queries, keys, values, scale=scale)

    monkeypatch.setattr(cross, "attend", counted)
    states, features = given(2, 300)
    crossed(layer, states[:, :63], features.bfloat16(), torch.bfloat16)
    assert (ways, by_keys) == ([32, 31], [])
    crossed(layer, states, features)
    assert (ways, by_keys) == ([32, 31], [128, 128, 44])


@pytest.mark.parametrize(
    ("device", "dtype", "most"), [("cpu", None, 31), ("cpu", HALF, 63), ("cuda", None, 63), ("cuda", HALF, 11)]
)
def test_many_tokens_attend_to_keys(
    layer: BlipTextAttention, ways: list[int], device: str, dtype: torch.dtype | None, most: int
) -> None:
    with fake_mode() as mode:
        ours = CrossAttention(build(make) if device == "cuda" else layer, HEADS, dtype)
        for num_tokens in (most, most + 1):
            states, features = given(2, num_tokens)
            if device == "cuda":
                states, features = (mode.from_tensor(x).to(device) for x in (states, features))
            assert ours(Carried(states, states), features.to(dtype)).states.shape == states.shape
    assert sum(ways) == most
