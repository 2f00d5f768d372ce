"""Attention, by whichever kernel is the fastest for the device, the dtype and the number of queries."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from vlmflow.models.fused import attempt, can_fuse

# Up to here torch's fused kernel for processors costs more than two products and a softmax do.
_FEW_QUERIES = 16
# Of a text in float32 on CUDA, and of a head: the kernel holds all of a head in registers.
_MAX_FUSED_TOKENS, _MAX_FUSED_DIM = 64, 128


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        queries: (N, H, Q, d).
        keys: (N, H, K, d), as are the values.
        mask: bool, broadcast to (N, H, Q, K): False where a key is not to be seen.
        scale: of the scores; None: one by the square root of d.

    Returns:
        (N, Q, H * d): the heads side by side.
    """
    if _by_products(queries):
        scores = torch.matmul(queries * (queries.shape[-1] ** -0.5 if scale is None else scale), keys.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        context = torch.matmul(scores.softmax(dim=-1), values)
        return context.transpose(1, 2).flatten(2)
    return attend_fused(queries, keys, values, mask, scale)


def attend_fused(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """As :func:`attend`, by torch's fused kernel whatever it costs: its scores are float32 whatever the dtype."""
    context = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return context.transpose(1, 2).flatten(2)


def attend_within(projected: torch.Tensor, mask: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """Has the tokens of each text attend to each other.

    In float32 on CUDA by a kernel of ours: torch has but one there that takes a mask, which does without tensor cores.

    Args:
        projected: (N, L, 3 H d): queries, keys and values side by side.
        mask: (N, L) bool: False where a token is not to be seen; None: all are.

    Returns:
        (N, L, H d).
    """
    is_short = projected.shape[1] <= _MAX_FUSED_TOKENS and projected.shape[2] <= 3 * num_heads * _MAX_FUSED_DIM
    if projected.dtype == torch.float32 and is_short and can_fuse(projected, *([] if mask is None else [mask])):
        from vlmflow.models import triton_attention

        context = attempt(triton_attention.attend_within, projected, mask, num_heads)
        if context is not None:
            return context
    queries, keys, values = split_heads(projected, num_heads)
    return attend(queries, keys, values, None if mask is None else mask[:, None, None, :])


def split_heads(projected: torch.Tensor, num_heads: int, num_parts: int = 3) -> tuple[torch.Tensor, ...]:
    """Takes apart what one product gave: queries, keys and values side by side, or fewer of them.

    Args:
        projected: (N, T, parts * H * d).

    Returns:
        Of each part (N, H, T, d).
    """
    heads = projected.view(*projected.shape[:2], num_parts, num_heads, -1)
    return heads.permute(2, 0, 3, 1, 4).unbind(0)


def growing(device: torch.device) -> AbstractContextManager[None]:
    """Attention within the block is to shapes that change from call to call, as those of a cache do that grows.

    On CUDA that rules cuDNN out, which torch prefers on Hopper, and which makes a plan for every shape, keeps it for
    good, and takes longer for that than a step of decoding does. Other threads do without it meanwhile.
    """
    return _without_cudnn if device.type == "cuda" else nullcontext()


class _WithoutCudnn(AbstractContextManager[None]):
    """Attention without cuDNN while any thread is within: torch's switch is the process's, not the thread's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_within = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if self._num_within == 0:
                self._was_on = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._num_within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_within -= 1
            if self._num_within == 0:
                torch.backends.cuda.enable_cudnn_sdp(self._was_on)


_without_cudnn = _WithoutCudnn()


def _by_products(queries: torch.Tensor) -> bool:
    if queries.device.type != "cpu":
        return False
    if queries.shape[2] <= _FEW_QUERIES:
        return True
    # Without AMX the fused kernel gains nothing from bfloat16, as the products of oneDNN do.
    return queries.dtype == torch.bfloat16 and not _has_amx()


@cache
def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
