"""Attention as kernels in Triton: of the tokens of a text to each other, and to the features of an image.

Imported where CUDA is at hand, see :mod:`vlmflow.models.fused`: Triton is no part of torch's builds for processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _attend_step(  # type: ignore[no-untyped-def]
    projected,
    keys,
    values,
    position,
    out,
    heads,
    length,
    dim,
    scale,
    tokens: tl.constexpr,
    block: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # of a row and a head
    row = pair // heads
    columns = tl.arange(0, block)
    inside = columns < dim
    own = projected + 3 * row * heads * dim + (pair - row * heads) * dim + columns
    query = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(own + heads * dim, mask=inside, other=0.0)
    value = tl.load(own + 2 * heads * dim, mask=inside, other=0.0)
    now = tl.load(position)
    kept = pair * length * dim + columns
    tl.store(keys + kept + now * dim, key, mask=inside)
    tl.store(values + kept + now * dim, value, mask=inside)
    token = tl.arange(0, tokens)
    seen = token < now
    places = kept[None, :] + token[:, None] * dim
    visible = seen[:, None] & inside[None, :]
    scores = tl.sum(tl.load(keys + places, mask=visible, other=0.0).to(tl.float32) * query[None, :], axis=1)
    scores = tl.where(seen, scores, float("-inf"))
    score = tl.sum(key.to(tl.float32) * query, axis=0)
    highest = tl.maximum(tl.max(scores, axis=0), score)
    weights, weight = tl.exp(scores - highest), tl.exp(score - highest)
    context = tl.sum(tl.load(values + places, mask=visible, other=0.0).to(tl.float32) * weights[:, None], axis=0)
    context = (context + weight * value.to(tl.float32)) / (tl.sum(weights, axis=0) + weight)
    tl.store(out + pair * dim + columns, context.to(out.dtype.element_ty), mask=inside)


def attend_step(
    projected: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Keeps the keys and values of a token, and has it attend to those up to it; computed in float32.

    Args:
        projected: (N, 1, 3 H d), contiguous: its queries, keys and values.
        keys: (N, H, L, d), contiguous, as are the values.
        position: (1,) int64, below L.

    Returns:
        (N, 1, H d).
    """
    num_rows, num_heads, length, dim = keys.shape
    out = projected.new_empty((num_rows, 1, num_heads * dim))
    if num_rows:
        with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
            _attend_step[(num_rows * num_heads,)](
                projected,
                keys,
                values,
                position,
                out,
                num_heads,
                length,
                dim,
                dim**-0.5,
                tokens=triton.next_power_of_2(length),
                block=triton.next_power_of_2(dim),
                num_warps=2,
            )
    return out


@triton.jit(do_not_specialize=("length",))  # type: ignore[untyped-decorator]
def _attend_within(  # type: ignore[no-untyped-def]
    projected,
    mask,
    out,
    heads,
    length,
    dim,
    scale,
    hides: tl.constexpr,
    precision: tl.constexpr,
    tokens: tl.constexpr,
    block: tl.constexpr,
):
    text, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, column = tl.arange(0, tokens), tl.arange(0, block)
    is_token = token < length
    inside = is_token[:, None] & (column < dim)[None, :]
    place = (text * length + token)[:, None]
    own = projected + (3 * place * heads + head) * dim + column[None, :]
    query = tl.load(own, mask=inside, other=0.0)
    key = tl.load(own + heads * dim, mask=inside, other=0.0)
    value = tl.load(own + 2 * heads * dim, mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
    seen = is_token
    if hides:
        seen = is_token & (tl.load(mask + text * length + token, mask=is_token, other=0) != 0)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    context = tl.dot(weights.to(value.dtype), value, input_precision=precision) / tl.sum(weights, axis=1)[:, None]
    tl.store(out + (place * heads + head) * dim + column[None, :], context.to(out.dtype.element_ty), mask=inside)


def attend_within(projected: torch.Tensor, mask: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """Has the tokens of each text attend to each other; sums are float32, products TF32 where torch may do those so.

    Args:
        projected: (N, L, 3 H d), contiguous: queries, keys and values side by side; L at most 64, d at most 128.
        mask: (N, L) bool, contiguous, True of at least one token of each text; None: all are seen.

    Returns:
        (N, L, H d).
    """
    num_texts, length, width = projected.shape
    dim = width // (3 * num_heads)
    out = projected.new_empty((num_texts, length, width // 3))
    if out.numel():
        with torch.cuda.device_of(projected):  # type: ignore[no-untyped-call]
            _attend_within[(num_texts, num_heads)](
                projected,
                projected if mask is None else mask.view(torch.uint8),
                out,
                num_heads,
                length,
                dim,
                dim**-0.5,
                hides=mask is not None,
                precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
                tokens=max(16, triton.next_power_of_2(length)),
                block=max(16, triton.next_power_of_2(dim)),
                num_warps=4,
            )
    return out


@triton.jit(do_not_specialize=("length",))  # type: ignore[untyped-decorator]
def _attend_to_features(  # type: ignore[no-untyped-def]
    queries,
    features,
    out,
    heads,
    texts,
    length,
    tokens,
    width,
    rows: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
):
    # Rows are the heads of an image's texts; a part is a block of the features' width, and there are up to four.
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    is_row = row < heads * texts
    column = tl.arange(0, block)
    at = ((row % heads).to(tl.int64) * length + image * texts + row // heads)[:, None] * width + column[None, :]
    highest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mean_0 = tl.zeros([rows, block], tl.float32)
    if parts > 1:
        mean_1 = tl.zeros([rows, block], tl.float32)
    if parts > 2:
        mean_2 = tl.zeros([rows, block], tl.float32)
    if parts > 3:
        mean_3 = tl.zeros([rows, block], tl.float32)
    for start in range(0, tokens, tile):
        token = start + tl.arange(0, tile)
        is_token = token < tokens
        seen = (image * tokens + token)[:, None] * width + column[None, :]
        # Queries are read anew each time, from the cache: kept, they would take all registers. Sums of scores are apart
        # by parts: a chain of products waits for each.
        x_0 = tl.load(features + seen, mask=is_token[:, None] & (column < width)[None, :], other=0.0)
        q_0 = tl.load(queries + at, mask=is_row[:, None] & (column < width)[None, :], other=0.0)
        scores = tl.dot(q_0, tl.trans(x_0))
        if parts > 1:
            inside = (column + block < width)[None, :]
            x_1 = tl.load(features + seen + block, mask=is_token[:, None] & inside, other=0.0)
            q_1 = tl.load(queries + at + block, mask=is_row[:, None] & inside, other=0.0)
            scores += tl.dot(q_1, tl.trans(x_1))
        if parts > 2:
            inside = (column + 2 * block < width)[None, :]
            x_2 = tl.load(features + seen + 2 * block, mask=is_token[:, None] & inside, other=0.0)
            q_2 = tl.load(queries + at + 2 * block, mask=is_row[:, None] & inside, other=0.0)
            scores += tl.dot(q_2, tl.trans(x_2))
        if parts > 3:
            inside = (column + 3 * block < width)[None, :]
            x_3 = tl.load(features + seen + 3 * block, mask=is_token[:, None] & inside, other=0.0)
            q_3 = tl.load(queries + at + 3 * block, mask=is_row[:, None] & inside, other=0.0)
            scores += tl.dot(q_3, tl.trans(x_3))
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - now[:, None])
        shrunk = tl.exp(highest - now)
        highest = now
        total = total * shrunk + tl.sum(weights, axis=1)
        weights = weights.to(x_0.dtype)
        mean_0 = tl.dot(weights, x_0, mean_0 * shrunk[:, None])
        if parts > 1:
            mean_1 = tl.dot(weights, x_1, mean_1 * shrunk[:, None])
        if parts > 2:
            mean_2 = tl.dot(weights, x_2, mean_2 * shrunk[:, None])
        if parts > 3:
            mean_3 = tl.dot(weights, x_3, mean_3 * shrunk[:, None])
    share = (1.0 / total)[:, None]
    kind = out.dtype.element_ty
    tl.store(out + at, (mean_0 * share).to(kind), mask=is_row[:, None] & (column < width)[None, :])
    if parts > 1:
        inside = is_row[:, None] & (column + block < width)[None, :]
        tl.store(out + at + block, (mean_1 * share).to(kind), mask=inside)
    if parts > 2:
        inside = is_row[:, None] & (column + 2 * block < width)[None, :]
        tl.store(out + at + 2 * block, (mean_2 * share).to(kind), mask=inside)
    if parts > 3:
        inside = is_row[:, None] & (column + 3 * block < width)[None, :]
        tl.store(out + at + 3 * block, (mean_3 * share).to(kind), mask=inside)


@dataclass(frozen=True)
class CrossSizes:
    """Of a program: at these it spills no register, and has no more shared memory than GPUs for consumers give.

    Attributes:
        rows: queries that it takes; so many of an image read the image's tokens once.
        tile: tokens at a time.
        block: of the features' width, in ``parts``.
        num_stages: of the loads that run ahead of the products.
    """

    rows: int
    tile: int
    block: int
    parts: int
    num_warps: int
    num_stages: int = 2

    @classmethod
    def of(cls, num_rows: int, width: int) -> CrossSizes:
        """For so many queries of an image, one of each head of each text, in so many dimensions."""
        few, narrow = num_rows <= 16, width <= 768
        block = max(16, min(256, triton.next_power_of_2(width)))
        return cls(
            16 if few else 32, 32 if narrow else 16, block, triton.cdiv(width, block), 4 if few and narrow else 8
        )


def attend_to_features(queries: torch.Tensor, features: torch.Tensor, sizes: CrossSizes | None = None) -> torch.Tensor:
    """Means of an image's tokens, weighed by the softmax of their products with the queries.

    Each tile of tokens is read once, for its scores and for its share of the means; sums are float32.

    Args:
        queries: (H, N L, E), contiguous: L of each of N images, image by image; E at most 1024.
        features: (N, T, E), contiguous, of the same dtype, which products are made of: bfloat16 or float16.
        sizes: of the kernel's programs; None: those of :meth:`CrossSizes.of`.

    Returns:
        (H, N L, E).
    """
    num_heads, num_texts, width = queries.shape
    num_images, num_tokens, _ = features.shape
    out = torch.empty_like(queries)
    if queries.numel() == 0:
        return out
    sizes = sizes or CrossSizes.of(num_heads * num_texts // num_images, width)
    with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]
        _attend_to_features[(triton.cdiv(num_heads * num_texts // num_images, sizes.rows), num_images)](
            queries,
            features,
            out,
            num_heads,
            num_texts // num_images,
            num_texts,
            num_tokens,
            width,
            rows=sizes.rows,
            tile=sizes.tile,
            block=sizes.block,
            parts=sizes.parts,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
    return out
