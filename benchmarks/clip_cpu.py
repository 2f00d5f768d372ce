"""Embedding images on a processor: ours beside open_clip, in float32, bfloat16 and int8.

Speed: ViT-B/32 and ViT-L/14 of the real sizes with random weights, from normalised pixels to features, all ways in one
process, turn about, the best of the repeats. What they change: the starter's embedder over the pictures of the demo,
scored by the demo's policy; set against float32 are the cosines of the vectors, the scores of the labels and the
decisions. int8 is here to show why jobs do not offer it: weights by output channel, activations by batch.

    python -m benchmarks.clip_cpu [--threads 1] [--batch 16]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from benchmarks.machine import save_result
from benchmarks.random_models import VIT_B_32, VIT_L_14, write_clip
from vlmflow.config import ModelConfig
from vlmflow.models import clip_packed, load_embedder, packed
from vlmflow.models.clip import ClipEmbedder, build
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import load_policy
from vlmflow.moderation.prompts import encode_prompts

_STARTER = Path("vlmflow/starter")
_TOLERANCE = 0.01  # of a label's score
Embed = Callable[[torch.Tensor], torch.Tensor]


class Int8Linear:
    """In the place of a packed layer: products of bytes, through torch's own kernels."""

    def __init__(self, layers: Any, activation: str | None = None, dtype: torch.dtype | None = None) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        scales = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        levels = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(levels, self.bias)
        self._is_gelu = activation == "gelu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.quantized.linear_dynamic(x, self._packed)
        return torch.nn.functional.gelu(product) if self._is_gelu else product


def int8(model: Any) -> Any:
    """A copy of a float32 model with all layers of the image tower in int8."""
    layer, packed.PackedLinear = packed.PackedLinear, Int8Linear  # type: ignore[misc,assignment]
    try:
        copied = copy.deepcopy(model)
        assert clip_packed.pack_image_tower(copied)
    finally:
        packed.PackedLinear = layer  # type: ignore[misc]
    return copied


def ways(folder: Path) -> dict[str, Embed]:
    """All the ways to embed (N, 3, S, S) normalised float32 pixels with the weights of a folder."""
    config = ModelConfig(family="open_clip", path=str(folder))
    plain, half = (build(folder, None, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = {dtype: copy.deepcopy(plain) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, model in ours.items():
        assert clip_packed.pack_image_tower(model, dtype), config.path
    models: dict[str, Any] = {"open_clip float32": plain, "ours float32": ours[torch.float32]}
    models |= {"ours bfloat16": ours[torch.bfloat16], "int8": int8(plain)}
    found: dict[str, Embed] = {name: model.encode_image for name, model in models.items()}
    return found | {"open_clip bfloat16": lambda pixels: half.encode_image(pixels.bfloat16())}  # type: ignore[operator]


def speeds(architecture: dict[str, Any], batch: int, repeats: int) -> dict[str, Any]:
    """Images a second of every way, and their ratios to open_clip in float32."""
    with tempfile.TemporaryDirectory() as folder:
        by_name = ways(write_clip(Path(folder) / "clip", architecture))
    side = architecture["vision_cfg"]["image_size"]
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(by_name, float("inf"))
    for repeat in range(1 + repeats):  # the first is not counted
        for name, embed in by_name.items():
            started = time.perf_counter()
            embed(pixels)
            if repeat:
                best[name] = min(best[name], time.perf_counter() - started)
    rates = {name: round(batch / seconds, 2) for name, seconds in best.items()}
    return {
        "images_per_s": rates,
        "ratio_to_open_clip_float32": {
            name: round(rate / rates["open_clip float32"], 2) for name, rate in rates.items()
        },
    }


def parity() -> dict[str, Any]:
    """What bfloat16 and int8 change of the demo's vectors, scores and decisions.

    On a processor what is carried from layer to layer stays float32; on CUDA it is bfloat16 as well.
    """
    folder = _STARTER / "clip"
    config = ModelConfig(family="open_clip", path=str(folder))
    exact, half = (load_embedder(config, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    assert isinstance(exact, ClipEmbedder)
    assert isinstance(half, ClipEmbedder)
    bytewise, carried = copy.copy(exact), copy.copy(half)
    bytewise._model = int8(build(folder, None, "cpu", torch.float32))
    carried._normalize = PixelNormalizer(read_preprocessing(folder, config), "cpu", torch.bfloat16)
    carried._model = build(folder, None, "cpu", torch.bfloat16, packed_for=carried._normalize)
    pixels = demo_pixels(read_preprocessing(folder, config).size)
    policy = load_policy("demo")
    moderator = Moderator(policy, policy.bindings[0], encode_prompts(policy, exact))
    expected = exact.embed_images(pixels)
    scores, decisions = moderated(moderator, expected)
    found: dict[str, Any] = {"images": len(pixels), "labels": scores.shape[1]}
    for name, embedder in (("bfloat16", half), ("bfloat16_as_on_cuda", carried), ("int8", bytewise)):
        vectors = embedder.embed_images(pixels)
        others, decided = moderated(moderator, vectors)
        moved = np.abs(others - scores)
        found[name] = {
            "least_cosine": round(float((vectors * expected).sum(axis=1).min()), 6),
            "greatest_change_of_a_score": round(float(moved.max()), 4),
            f"share_of_scores_within_{_TOLERANCE}": round(float((moved <= _TOLERANCE).mean()), 5),
            "decisions_changed": sum(one != other for one, other in zip(decisions, decided, strict=True)),
        }
    return found


def demo_pixels(size: int) -> torch.Tensor:
    """(N, 3, S, S) uint8: the demo's pictures, squashed, those apart that are broken on purpose."""
    pictures = []
    for path in sorted((_STARTER / "demo").iterdir()):
        try:
            with Image.open(path) as image:
                pictures.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
        except (UnidentifiedImageError, OSError):
            continue
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def moderated(moderator: Moderator, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], list[str]]:
    """(N, L) scores, and N decisions."""
    found = moderator.moderate(vectors, ["squash"] * len(vectors), np.arange(len(vectors) + 1))
    labels = found.labels.flatten().to_pylist()
    values = [row["score"] if row["probability"] is None else row["probability"] for row in labels]
    return np.array(values).reshape(len(vectors), -1), found.decision.to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--batch", type=int, default=16, help="images at once; default: 16")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's quantized kernels
    torch.set_num_threads(options.threads)
    torch.backends.quantized.engine = "onednn"
    load_before = os.getloadavg()
    result: dict[str, object] = {
        "workload": "embedding on a processor; random weights of the real sizes for speed, the starter for parity",
        "threads": options.threads,
        "batch": options.batch,
    }
    with torch.inference_mode():
        for name, architecture in (("ViT-B/32", VIT_B_32), ("ViT-L/14", VIT_L_14)):
            result[name] = speeds(architecture, options.batch, options.repeats)
            print(name, result[name], flush=True)
    result["parity_of_the_starter_over_the_demo"] = parity()
    print(result["parity_of_the_starter_over_the_demo"])
    loads = [[round(value, 2) for value in load] for load in (load_before, os.getloadavg())]
    print(save_result("clip_cpu", result | {"load_before_and_after": loads}))


if __name__ == "__main__":
    main()
