"""Attention on a GPU, call by call: what its thresholds and kernels are chosen by. `benchmarks.gpu_pool` runs it first.

* A token of each image that attends to its features, as in decoding: the kernel as it is, and at other sizes.
* Texts of 8 to 64 tokens, by the features themselves and by keys and values: where the two meet is
  ``_MANY_IN_HALF_ON_CUDA`` of ``vlmflow/models/blip_fast/cross.py``.
* The attention within both vision towers, by FlashAttention and by cuDNN; and the first call of cuDNN with another
  batch size, which makes a plan.

All in bfloat16, at batch 256.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention

from vlmflow.models.blip_fast.cross import CrossAttention, attend_to_features

_TEXT_TOKENS = (8, 16, 24, 32, 64)
_HALF = torch.bfloat16
_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Images, heads and dimensions of a text, tokens of an image; and (N, H, T, d) of the towers' attention."""

    images: int = 256
    heads: int = 12
    width: int = 768
    tokens: int = 577
    towers: tuple[tuple[int, int, int, int], ...] = ((256, 12, 577, 64), (256, 16, 257, 64))


_TINY = Sizes(2, 2, 64, 17, ((2, 2, 17, 32),))
_Time = float | str


@torch.inference_mode()
def measure(device: str, *, tiny: bool) -> dict[str, Any]:
    """Milliseconds of each; in their place, why it does not run here."""
    sizes = _TINY if tiny else Sizes()
    features = torch.randn(sizes.images, sizes.tokens, sizes.width, device=device).to(_HALF)
    found = {
        "sizes": dataclasses.asdict(sizes),
        "decoding_ms": _decoding(features, sizes),
        "cross_attention_ms": _cross(features, sizes),
        "towers_ms": [_tower(shape, device) for shape in sizes.towers],
    }
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def _decoding(features: torch.Tensor, sizes: Sizes) -> dict[str, _Time]:
    queries = torch.randn(sizes.heads, sizes.images, sizes.width, device=features.device).to(_HALF)
    found = {"as_it_is": _repeated(lambda: attend_to_features(queries, features))}
    if not features.is_cuda:
        return found
    from vlmflow.models import triton_attention

    chosen = triton_attention.CrossSizes.of(sizes.heads, sizes.width)
    for name, other in {
        "tile_16_stages_3": dataclasses.replace(chosen, tile=16, num_stages=3),
        "warps_8": dataclasses.replace(chosen, num_warps=8),
    }.items():
        found[name] = _repeated(partial(triton_attention.attend_to_features, queries, features, other))
    return found


def _cross(features: torch.Tensor, sizes: Sizes) -> list[dict[str, _Time]]:
    config = BlipTextConfig(
        hidden_size=sizes.width, num_attention_heads=sizes.heads, encoder_hidden_size=sizes.width, is_decoder=True
    )
    layer = BlipTextAttention(config, is_cross_attention=True, layer_idx=0).eval().to(features.device)
    cross = CrossAttention(layer, sizes.heads, _HALF)
    found: list[dict[str, _Time]] = []
    for length in _TEXT_TOKENS:
        queries = torch.randn(sizes.images, length, sizes.width, device=features.device).to(_HALF)
        ways = {"by_features": cross.by_features, "by_keys": cross.by_keys}
        times = {name: _repeated(partial(way, queries, features)) for name, way in ways.items()}
        found.append({"tokens": length} | times)
    return found


def _tower(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    states = torch.randn(3, *shape, device=device).to(_HALF)
    found: dict[str, Any] = {"shape": shape}
    for name, backend in {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.items():
        with sdpa_kernel(backend):
            found[name] = _repeated(partial(scaled_dot_product_attention, *states))
            found[f"{name}_first_with_one_row_less"] = _once(partial(scaled_dot_product_attention, *states[:, 1:]))
    return found


def _repeated(call: Callable[[], object]) -> _Time:
    """The mean of calls behind the first two."""
    first = [_once(call) for _ in range(2)]
    return first[-1] if isinstance(first[-1], str) else round(_spent(call, _REPEATS), 4)


def _once(call: Callable[[], object]) -> _Time:
    try:
        return round(_spent(call, 1), 4)
    except Exception as error:  # noqa: BLE001 - a kernel is not there, or asks for more than the device has: of any class
        return " ".join(str(error).split())[:120]


def _spent(call: Callable[[], object], repeats: int) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return 1000 * (time.perf_counter() - started) / repeats
