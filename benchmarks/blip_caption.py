"""Captions a second of our BLIP beside ``generate`` of transformers.

``python -m benchmarks.blip_caption --device cuda`` (or ``cpu``) builds a BLIP-base of the real size (384 px, 224
million parameters) with random weights, of which no caption ends before 20 new tokens, and captions the same images
with both in one process, turn about, in float32 and bfloat16, from pixels on the device to tokens; transformers is
given pixels that are normalised already. Of the repeats the best counts. The multiplications and additions of the model
over the time are set against the best of a plain product of large matrices on the same device, measured between the
repeats.

The likeliest words of random weights are about as near to each other as bfloat16 rounds: in it few captions are equal
on both sides. Trained weights say the same in it as in float32: tests/unit/models/test_blip_fast.py.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from benchmarks.side_by_side import Place, Run, Workload, compare
from vlmflow.models.blip_fast import GreedyDecoder, SpecialTokens, TextTower, VisionTower
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing

SIZE, NEW_TOKENS, WIDTH, LAYERS, HEADS, PATCH = 384, 20, 768, 12, 12, 16
_PREPROCESSING = Preprocessing(
    SIZE, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def build_model(device: str) -> Any:
    """The size of `blip-image-captioning-base`; pictures and words all count, and no caption ends."""
    both = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "initializer_range": 0.02}
    config = BlipConfig(text_config=both | {"encoder_hidden_size": WIDTH}, vision_config=both | {"image_size": SIZE})
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval().requires_grad_(False)
    model.text_decoder.cls.predictions.bias[config.text_config.sep_token_id] = -1e4
    return model.to(device)


def sides(model: Any, place: Place) -> dict[str, Run]:
    """Ours and that of transformers, on the same weights: pixels to (N, 20) tokens."""
    config = model.config.text_config
    normalize = PixelNormalizer(_PREPROCESSING, *place)
    vision = VisionTower(model.vision_model, normalize)
    special = SpecialTokens(config.bos_token_id, config.sep_token_id, config.pad_token_id)
    decode = GreedyDecoder(TextTower(model.text_decoder.bert, model.text_decoder.cls), special)
    inputs: dict[int, torch.Tensor] = {}

    def generate(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) not in inputs:
            inputs[len(pixels)] = normalize(pixels)
        values = inputs[len(pixels)]
        tokens: torch.Tensor = model.generate(
            pixel_values=values, do_sample=False, num_beams=1, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
        return tokens[:, 1:]

    return {"ours": lambda pixels: decode(vision(pixels), NEW_TOKENS), "transformers": generate}


def flops_per_caption() -> float:
    """Twice the multiplications of all products: vision tower, keys and values of the images, 20 steps of a token.

    As the model is published, on both sides: ours makes no keys and values of the images.
    """
    tokens = (SIZE // PATCH) ** 2 + 1
    layer = 12 * WIDTH * WIDTH  # of weights: four projections, and two of four times the width
    patches = (tokens - 1) * 3 * PATCH * PATCH * WIDTH
    vision = patches + LAYERS * (tokens * layer + 2 * tokens * tokens * WIDTH)
    memory = LAYERS * tokens * 2 * WIDTH * WIDTH
    seen = sum(range(1, NEW_TOKENS + 1))
    decoder = LAYERS * (NEW_TOKENS * (layer + 2 * WIDTH * WIDTH + 2 * tokens * WIDTH) + 2 * seen * WIDTH)
    head = NEW_TOKENS * (WIDTH * WIDTH + WIDTH * 30_524)
    return 2.0 * (vision + memory + decoder + head)


def main() -> None:
    compare(
        Workload("blip_caption", "caption", __doc__ or "", SIZE, flops_per_caption(), build=build_model, sides=sides)
    )


if __name__ == "__main__":
    main()
