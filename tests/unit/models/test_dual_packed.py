"""The packed layers of dual encoders as CUDA would run them, against transformers' own in the same dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.dual_encoders import PACKED
from tests.models import random_pixels
from vlmflow.config import ModelConfig
from vlmflow.models import load_embedder, load_text_embedder
from vlmflow.models.dual_encoder import DualEmbedder, pack_layers
from vlmflow.models.packed import PackedTower


def loaded(folder: Path, seed: int = 0) -> Any:
    """In float32, with norms and biases as trained ones: they scale and shift."""
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for module in model.vision_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 2.0)
            module.bias.normal_(0.0, 0.3)
        elif isinstance(module, torch.nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.1)
    return model


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.get_image_features(pixel_values=images).pooler_output.float()
    return found


@pytest.mark.parametrize("kind", PACKED)
def test_carried_in_float32_they_give_what_transformers_gives(dual_encoders: dict[str, Path], kind: str) -> None:
    ours, images = loaded(dual_encoders[kind]), torch.randn(3, 3, 32, 32)
    expected = features(ours, images)
    pack_layers(ours, torch.float32, torch.float32)
    assert isinstance(ours.vision_model.encoder.layers[0], PackedTower)
    torch.testing.assert_close(features(ours, images), expected, atol=1e-4, rtol=1e-4)
    assert expected.std(dim=0).min() > 0.01


@pytest.mark.parametrize("kind", ["clip", "laion", "siglip"])
def test_carried_in_bfloat16_they_lose_no_more_than_those_of_transformers(
    dual_encoders: dict[str, Path], kind: str
) -> None:
    """QuickGELU, GELU, and GELU by its tanh formula; over many weights, since what is lost of one is chance."""
    lost = {"theirs": 0.0, "ours": 0.0}
    for seed in range(6):
        images = torch.randn(8, 3, 32, 32)
        expected = features(loaded(dual_encoders[kind], seed), images)
        theirs, ours = loaded(dual_encoders[kind], seed).bfloat16(), loaded(dual_encoders[kind], seed)
        pack_layers(ours, torch.bfloat16, torch.bfloat16)
        ours.bfloat16()
        for name, model in (("theirs", theirs), ("ours", ours)):
            lost[name] += (features(model, images.bfloat16()) - expected).square().sum().item()
    assert 0 < lost["ours"] <= 1.05 * lost["theirs"]


_ORDERS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_in_any_order_of_memory_are_the_same_to_them(dual_encoders: dict[str, Path], kind: str) -> None:
    """Patches of channels-last images lie token by token, those of others do not."""
    embedder = load_embedder(ModelConfig(family="dual_encoder", path=str(dual_encoders[kind])), "cpu")
    pixels = random_pixels(3)
    vectors = [embedder.embed_images(pixels.contiguous(memory_format=order)) for order in _ORDERS]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_for_prompts_the_image_encoder_stays_as_it_is(dual_encoders: dict[str, Path], kind: str) -> None:
    """A driver has no image to embed, and packing takes as long as reading."""
    config = ModelConfig(family="dual_encoder", path=str(dual_encoders[kind]))
    for_prompts: Any = load_text_embedder(config)
    packed, pixels = load_embedder(config, "cpu"), random_pixels(2)
    assert not isinstance(for_prompts._model.vision_model.encoder.layers[0], PackedTower)
    texts = ["a red car", "two dogs"]
    assert for_prompts.embed_texts(texts).tobytes() == packed.embed_texts(texts).tobytes()
    np.testing.assert_allclose(for_prompts.embed_images(pixels), packed.embed_images(pixels), atol=1e-5)


def test_until_a_gpu_has_run_them_cuda_has_the_layers_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(DualEmbedder, "_of_files", lambda *_, packs: asked.append(packs))
    config = ModelConfig(family="dual_encoder", path="unused")
    for device in ("cpu", "cuda"):
        DualEmbedder.load(Path("unused"), config, device, "float32")
    DualEmbedder.load(Path("unused"), config, "cuda", "float32", packs=True)
    DualEmbedder.load(Path("unused"), config.model_copy(update={"family": "align"}), "cpu", "float32")
    assert asked == [True, False, True, False]
