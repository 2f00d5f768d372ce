"""The kernels for CUDA, as Triton's interpreter runs them on a processor; tests marked `gpu` run them for good."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmflow.imaging.device import coefficients
from vlmflow.models import fused
from vlmflow.models.attention import attend, split_heads

HALF = torch.bfloat16


def norm_arguments(width: int, affine: bool, carried: torch.dtype, given: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(width)
    states, added = 3 * torch.randn(2, 3, width).to(carried) + 5, torch.randn(2, 3, width).to(HALF)
    scale = (1 + torch.rand(width), torch.randn(width)) if affine else None
    return {"scale": scale, "dtype": given, "states": states, "added": added, "offset": torch.randn(width)}


def attention_arguments(dtype: torch.dtype, length: int, dim: int, position: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    kept = torch.randn(2, 3, 2, length, dim).to(dtype)
    kept[:, :, :, position:] = torch.nan  # what was there before, and must not be seen
    projected = torch.randn(3, 1, 3 * 2 * dim).to(dtype)
    return {
        "projected": projected,
        "keys": kept[0].clone(),
        "values": kept[1].clone(),
        "position": torch.tensor([position]),
    }


NORMS = [
    norm_arguments(width, affine, carried, given)
    for width in (24, 768, 1000)
    for affine in (True, False)
    for carried, given in [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF), (HALF, torch.float32)]
]
STEPS = [
    attention_arguments(dtype, length, dim, position)
    for dtype in (torch.float32, HALF)
    for length, dim in [(20, 64), (5, 24)]
    for position in (0, 3, length - 1)
]


def cross_arguments(dtype: torch.dtype, heads: int, images: int, texts: int, tokens: int, width: int) -> Any:
    torch.manual_seed(width)
    queries, features = torch.randn(heads, images * texts, width) / width**0.5, torch.randn(images, tokens, width)
    return {"queries": (3 * queries).to(dtype), "features": features.to(dtype)}


def text_arguments(texts: int, heads: int, length: int, dim: int, *, hides: bool) -> dict[str, Any]:
    torch.manual_seed(length)
    projected = 2 * torch.randn(texts, length, 3 * heads * dim)
    visible = torch.rand(texts, length) > 0.4
    visible[:, 0] = True
    return {"projected": projected, "mask": visible if hides else None, "num_heads": heads}


TEXTS = [
    text_arguments(texts, heads, length, dim, hides=hides)
    for texts, heads, length, dim in [(3, 2, 22, 64), (2, 3, 5, 24), (1, 1, 64, 128), (2, 2, 1, 16)]
    for hides in (True, False)
]
# Triton's interpreter computes products in bfloat16 from its bits.
CROSSES = [
    cross_arguments(dtype, *sizes)
    for dtype in (torch.float32, torch.float16)
    for sizes in [(2, 3, 1, 17, 24), (12, 2, 1, 577, 768), (3, 2, 7, 64, 520), (12, 1, 3, 33, 1024), (4, 2, 2, 5, 256)]
]
# More than a block of bytes; every half between two levels, and what lies below and above all levels.
LEVELS = (
    [
        torch.randint(0, 256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    ],
    [torch.arange(-20, 600, dtype=dtype).div(2).repeat(9) for dtype in (torch.float32, torch.float16)],
)
# Length, start and end of what is shown, size, interpolation: made smaller and larger, whole and in part.
COEFFICIENTS = [
    (length, start, end, size, interpolation)
    for interpolation in ("bicubic", "bilinear")
    for length, start, end, size in [(1201, 0, 1201, 6), (5, 0, 5, 8), (601, 200 / 3, 400.7, 4), (1, 0, 1, 2)]
]
# Triton's own functions are made for its interpreter when it is imported: in another process.
INTERPRETED = """
import sys, torch
from vlmflow.imaging.triton_levels import coefficients, stack, to_levels
from vlmflow.models.triton_attention import attend_step, attend_to_features, attend_within
from vlmflow.models.triton_norm import NormOf, NormSizes, norm

def norms(scale, dtype, states, added, offset):
    of = NormOf(scale, 1e-5, dtype)
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    found = [norm(of, states, added), norm(of, states), norm(of, states, offset=offset)]
    found.append(norm(of, states, added, keeps_sum=False, also=other, sizes=NormSizes(1, 1)))
    return [[each.summed, each.normed, each.rounded] for each in found]

def steps(**given):
    return [attend_step(**given), given["keys"], given["values"]]

given = torch.load(sys.argv[1], weights_only=True)
found = [[norms(**case) for case in given["norms"]], [steps(**case) for case in given["steps"]]]
found += [[attend(**case) for case in given[name]] for name, attend in
          (("crosses", attend_to_features), ("texts", attend_within))]
images, values = given["levels"]
found.append([stack(images, torch.full((len(images), *images[0].shape), torch.nan, dtype=kind)) for kind in
              (torch.float32, torch.float16)] + [to_levels(each.clone()) for each in values])
found.append([coefficients(torch.full((size, length), torch.nan, dtype=torch.float64), start, end, interpolation)
              for length, start, end, size, interpolation in given["coefficients"]])
torch.save(found, sys.argv[2])
"""


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from vlmflow.imaging import triton_levels
from vlmflow.models import triton_attention, triton_norm

def compiled(kernel, options=None, aligned=(), **given):
    constants = {name: value for name, value in given.items() if isinstance(value, (bool, list))}
    constants = {name: value[0] if isinstance(value, list) else value for name, value in constants.items()}
    signature = {name: "constexpr" if name in constants else kind for name, kind in given.items()}
    attrs = {(list(given).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert found.asm["cubin"]
    return found

for half in ("*bf16", "*fp32"):
    for flag in (True, False):
        flags = dict(adds=flag, keeps=flag, shifts=not flag, scales=flag, rounds=not flag)
        pointers = dict(states=half, added="*bf16", offset="*fp32", weight="*fp32", bias="*fp32")
        pointers |= dict(summed=half, normed=half, rounded="*bf16")
        numbers = dict(num_rows="i32", width="i32", eps="fp32")
        for block in (1024, 8192):
            sizes = triton_norm.NormSizes.of(block)
            constants, options = dict(rows=[sizes.rows], block=[block]), dict(num_warps=sizes.num_warps)
            compiled(triton_norm._norm, options, [*pointers, "width"], **pointers, **numbers, **flags, **constants)
    pointers = dict(projected=half, keys=half, values=half, position="*i64", out=half)
    sizes = dict(heads="i32", length="i32", dim="i32", scale="fp32", tokens=[32], block=[64])
    compiled(triton_attention._attend_step, **pointers, **sizes)

pointers = dict(queries="*bf16", features="*bf16", out="*bf16")
numbers = dict.fromkeys(("heads", "texts", "length", "tokens", "width"), "i32")
for rows in (12, 36):
    for width in (24, 768, 1024):
        sizes = triton_attention.CrossSizes.of(rows, width)
        constants = {name: [getattr(sizes, name)] for name in ("rows", "tile", "block", "parts")}
        options = dict(num_warps=sizes.num_warps, num_stages=sizes.num_stages)
        aligned = [*pointers, "width"] if width % 16 == 0 else pointers
        found = compiled(triton_attention._attend_to_features, options, aligned, **pointers, **numbers, **constants)
        assert found.metadata.shared <= 99 << 10, (rows, width, "more than GPUs for consumers give a program")
        if (rows, width) == (12, 768):
            assert found.metadata.shared <= 113 << 10, "two programs are to share a multiprocessor"

pointers = dict(projected="*fp32", mask="*u8", out="*fp32")
numbers = dict(heads="i32", length="i32", dim="i32", scale="fp32")
for precision in ("tf32", "ieee"):
    constants = dict(hides=True, precision=[precision], tokens=[64], block=[128])
    found = compiled(triton_attention._attend_within, None, **pointers, **numbers, **constants)
    assert found.metadata.shared <= 99 << 10, precision

pointers = dict(addresses="*i64", out="*fp16")
found = compiled(triton_levels._stack, None, [*pointers, "size"], **pointers, size="i32", block=[4096])
assert "ld.global.v4" in found.asm["ptx"], "bytes that are read one by one"
compiled(triton_levels._to_levels, None, ["values"], values="*fp16", size="i32", block=[4096])
numbers = dict.fromkeys(("start", "start_rest", "scale", "scale_rest"), "fp32")
for bicubic in (True, False):
    compiled(triton_levels._coefficients, out="*fp16", length="i32", **numbers, bicubic=bicubic, block=[512])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the kernels give for NORMS, for STEPS, for CROSSES, for TEXTS, for LEVELS and for COEFFICIENTS."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    given = {"norms": NORMS, "steps": STEPS, "crosses": CROSSES, "texts": TEXTS, "levels": LEVELS}
    given |= {"coefficients": COEFFICIENTS}
    torch.save(given, folder / "given.pt")
    command = [sys.executable, "-c", INTERPRETED, str(folder / "given.pt"), str(folder / "found.pt")]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    return torch.load(folder / "found.pt", weights_only=True)


def close_in(dtype: torch.dtype) -> Any:
    # The interpreter cuts to bfloat16, where a GPU rounds.
    return partial(torch.testing.assert_close, **dict.fromkeys(("rtol", "atol"), 2e-5 if dtype != HALF else 0.02))


def test_a_sum_and_its_norm(interpreted: Any) -> None:
    for case, found in zip(NORMS, interpreted[0], strict=True):
        states, added, given = case["states"], case["added"], case["dtype"]
        (summed, normed, _), (same, alone, _), (also, shifted, _), (unsummed, of_sum, rounded) = found
        weight, bias = case["scale"] or (None, None)
        norm = partial(torch.nn.functional.layer_norm, normalized_shape=states.shape[-1:], eps=1e-5)
        norm = partial(norm, weight=weight, bias=bias)
        close = close_in(given)
        torch.testing.assert_close(summed, states + added, rtol=0 if states.dtype != HALF else 2**-7, atol=0)
        assert torch.equal(same, states)
        assert torch.equal(also, states)
        assert torch.equal(unsummed, states)
        assert normed.dtype == alone.dtype == shifted.dtype == of_sum.dtype == given
        close(normed.float(), norm(summed.float()))
        close(alone.float(), norm(states.float()))
        close(shifted.float(), norm(states.float() + case["offset"]))
        close(of_sum.float(), norm(states.float() + added.float()))
        assert {of_sum.dtype, rounded.dtype} == {torch.float32, HALF}
        close_in(HALF)(rounded.float(), of_sum.float())


def test_a_token_attends_to_those_up_to_it(interpreted: Any) -> None:
    for case, (found, keys, values) in zip(STEPS, interpreted[1], strict=True):
        position = int(case["position"])
        query, key, value = case["projected"].view(3, 3, 2, 1, -1).unbind(1)
        for kept, before, own in ((keys, case["keys"], key), (values, case["values"], value)):
            assert torch.equal(kept[:, :, :position], before[:, :, :position])
            assert torch.equal(kept[:, :, position], own[:, :, 0])
            assert kept[:, :, position + 1 :].isnan().all()
        seen = [kept[:, :, : position + 1].float() for kept in (keys, values)]
        expected = torch.nn.functional.scaled_dot_product_attention(query.float(), *seen)
        close_in(found.dtype)(found.float(), expected.transpose(1, 2).flatten(2))


def test_texts_attend_to_the_features_of_their_images(interpreted: Any) -> None:
    for case, found in zip(CROSSES, interpreted[2], strict=True):
        queries, features = case["queries"].float(), case["features"].float()
        by_image = queries.view(len(queries), len(features), -1, queries.shape[-1]).transpose(0, 1)
        weights = torch.einsum("nhle,nte->nhlt", by_image, features).softmax(dim=-1)
        assert weights.max() > 0.05  # not all alike
        expected = torch.einsum("nhlt,nte->hnle", weights, features).flatten(1, 2)
        assert found.dtype == case["queries"].dtype
        bound = 1e-5 if found.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)


def test_the_tokens_of_a_text_attend_to_those_that_can_be_seen(interpreted: Any) -> None:
    for case, found in zip(TEXTS, interpreted[3], strict=True):
        mask = case["mask"]
        parts = split_heads(case["projected"], case["num_heads"])
        expected = attend(*parts, None if mask is None else mask[:, None, None, :])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bytes_become_levels(interpreted: Any) -> None:
    images, values = LEVELS
    single, half, *rounded = interpreted[4]
    assert (single.dtype, half.dtype) == (torch.float32, torch.float16)
    for found in (single, half):
        assert torch.equal(found, torch.stack(images).to(found.dtype))
    for found, given in zip(rounded, values, strict=True):
        assert given.min() < -1
        assert given.max() > 256
        assert torch.equal(found, given.round().clamp(0, 255))


def test_coefficients_of_a_resize(interpreted: Any) -> None:
    for found, (*given, interpolation) in zip(interpreted[5], COEFFICIENTS, strict=True):
        expected = coefficients(*given, interpolation, torch.device("cpu"))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_kernel_that_cannot_run_is_left_out_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "_unfit", set())
    calls: list[int] = []

    def too_large(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")

    assert [fused.attempt(too_large, torch.zeros(n)) for n in (1, 2)] == [None, None]
    assert calls == [1]
    assert caplog.text.count("too_large: RuntimeError: out of resource: shared memory") == 1
    assert fused.attempt(torch.neg, torch.ones(1)) == -1

    def no_memory(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fused.attempt(no_memory, torch.zeros(1))


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", COMPILED], env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True)


def test_without_triton_a_warning_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(fused, "_try", fails)
    fused.why_not.cache_clear()
    try:
        reason = fused.why_not()
    finally:
        fused.why_not.cache_clear()
    assert reason == "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    assert "Failed to find C compiler. Please specify via CC" in caplog.text


def test_want_of_memory_says_nothing_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    fused.why_not.cache_clear()
    monkeypatch.setattr(fused, "_try", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused.why_not()
    monkeypatch.setattr(fused, "_try", lambda: None)
    try:
        assert fused.why_not() is None
    finally:
        fused.why_not.cache_clear()
