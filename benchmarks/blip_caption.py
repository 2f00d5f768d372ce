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

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from benchmarks.machine import add_results_option, save_result
from vlmflow.engine.flops import matmul_ceiling
from vlmflow.models.blip_fast import GreedyDecoder, SpecialTokens, TextTower, VisionTower
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing

SIZE, NEW_TOKENS, WIDTH, LAYERS, HEADS, PATCH = 384, 20, 768, 12, 12, 16
_PREPROCESSING = Preprocessing(
    SIZE, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)
Caption = Callable[[torch.Tensor], torch.Tensor]
Place = tuple[str, torch.dtype]


def build_model(device: str) -> Any:
    """The size of `blip-image-captioning-base`; pictures and words all count, and no caption ends."""
    both = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "initializer_range": 0.02}
    config = BlipConfig(text_config=both | {"encoder_hidden_size": WIDTH}, vision_config=both | {"image_size": SIZE})
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval().requires_grad_(False)
    model.text_decoder.cls.predictions.bias[config.text_config.sep_token_id] = -1e4
    return model.to(device)


def sides(model: Any, device: str, dtype: torch.dtype) -> dict[str, Caption]:
    """Ours and that of transformers, on the same weights: pixels to (N, 20) tokens."""
    config = model.config.text_config
    normalize = PixelNormalizer(_PREPROCESSING, device, dtype)
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
    """Twice the multiplications of all products: vision tower, keys and values of the images, 20 steps of a token."""
    tokens = (SIZE // PATCH) ** 2 + 1
    layer = 12 * WIDTH * WIDTH  # of weights: four projections, and two of four times the width
    patches = (tokens - 1) * 3 * PATCH * PATCH * WIDTH
    vision = patches + LAYERS * (tokens * layer + 2 * tokens * tokens * WIDTH)
    memory = LAYERS * tokens * 2 * WIDTH * WIDTH
    seen = sum(range(1, NEW_TOKENS + 1))
    decoder = LAYERS * (NEW_TOKENS * (layer + 2 * WIDTH * WIDTH + 2 * tokens * WIDTH) + 2 * seen * WIDTH)
    head = NEW_TOKENS * (WIDTH * WIDTH + WIDTH * 30_524)
    return 2.0 * (vision + memory + decoder + head)


def seconds_of(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(model: Any, device: str, dtype: torch.dtype, batches: list[int], repeats: int) -> list[dict[str, object]]:
    """Both sides at one dtype, for every batch size."""
    by_side = sides(model, device, dtype)
    results: list[dict[str, object]] = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        pixels = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator).to(device)
        seconds, ceilings, equal = take_turns(by_side, pixels, (device, dtype), repeats)
        ceiling = max(ceilings)
        for side, times in seconds.items():
            # What other work on the machine takes away only ever makes a call longer.
            rate = batch / min(times)
            flops = rate * flops_per_caption()
            results.append(
                {
                    "side": side,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    "captions_per_s": round(rate, 3),
                    "captions_per_s_of_median": round(batch / statistics.median(times), 3),
                    "seconds": [round(value, 4) for value in times],
                    "tflops_per_s": round(flops / 1e12, 3),
                    "matmul_ceiling_tflops_per_s": round(ceiling / 1e12, 3),
                    "share_of_matmul_ceiling": round(flops / ceiling, 3),
                    "captions_equal_on_both_sides": round(equal, 4),
                }
            )
            print(results[-1], flush=True)
    return results


def take_turns(
    by_side: dict[str, Caption], pixels: torch.Tensor, place: Place, repeats: int
) -> tuple[dict[str, list[float]], list[float], float]:
    """Both sides and the plain product, in turn.

    Returns:
        Seconds of each repeat by side, the first call left out; FLOP/s of the product; the share of equal captions.
    """
    seconds: dict[str, list[float]] = {side: [] for side in by_side}
    device, dtype = place
    ceilings: list[float] = []
    tokens = {side: caption(pixels) for side, caption in by_side.items()}
    for _ in range(repeats):
        ceilings.append(matmul_ceiling(device, dtype))
        for side, caption in by_side.items():
            seconds[side].append(seconds_of(partial(caption, pixels), device))
    return seconds, ceilings, (tokens["ours"] == tokens["transformers"]).all(dim=1).float().mean().item()


def ratios(results: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Ours over transformers at equal dtype, and over its float32."""
    rates = {(row["side"], row["dtype"], row["batch"]): row["captions_per_s"] for row in results}
    found: list[dict[str, object]] = []
    for (side, dtype, batch), rate in rates.items():
        if side != "ours":
            continue
        ratio: dict[str, object] = {"dtype": dtype, "batch": batch}
        for name, other in (("over_equal_dtype", dtype), ("over_float32", "float32")):
            if ("transformers", other, batch) in rates:
                ratio[name] = round(rate / rates["transformers", other, batch], 2)
        found.append(ratio)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8; with CUDA 64 and 256 too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--repeats", type=int, help="default: 3, with CUDA 10")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a processor; default: all cores")
    add_results_option(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    torch.set_num_threads(options.threads)
    is_cuda = options.device == "cuda"
    batches = options.batch or ([1, 8, 64, 256] if is_cuda else [1, 8])
    repeats = options.repeats or (10 if is_cuda else 3)
    load_before = os.getloadavg()
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in options.dtype or ["float32", "bfloat16"]:
            dtype = getattr(torch, name)
            results += measure(build_model(options.device).to(dtype), options.device, dtype, batches, repeats)
            gc.collect()
            if is_cuda:
                torch.cuda.empty_cache()
            loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
            result: dict[str, object] = {
                "workload": " ".join((__doc__ or "").split("\n\n")[1].split()),
                "device": options.device,
                "threads": options.threads,
                "load_before_and_after": loads,
                "gflops_per_caption": round(flops_per_caption() / 1e9, 1),
                "ours_over_transformers": ratios(results),
                "runs": results,
            }
            path = save_result(f"blip_caption-{options.device}", result, options.results)  # what is measured is kept
    print(path)


if __name__ == "__main__":
    main()
