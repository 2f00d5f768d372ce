"""Sums and norms: the kernel for CUDA, interpreted here, and what does without it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from vlmflow.models import norm as module
from vlmflow.models.norm import Norm

HALF = torch.bfloat16


def layer_norm(width: int, *, affine: bool = True, dtype: torch.dtype = torch.float32) -> nn.LayerNorm:
    made = nn.LayerNorm(width, eps=1e-5, elementwise_affine=affine).requires_grad_(False)
    if affine:
        made.weight.uniform_(0.5, 2.0)
        made.bias.normal_()
    return made.to(dtype)


def arguments(width: int, affine: bool, carried: torch.dtype, given: torch.dtype) -> list[Any]:
    """Of the kernel: states, what is added, weight and bias, epsilon, the dtype of the norm."""
    torch.manual_seed(width)
    norm = layer_norm(width, affine=affine)
    states, added = 3 * torch.randn(2, 3, width).to(carried) + 5, torch.randn(2, 3, width).to(HALF)
    return [states, added, (norm.weight, norm.bias) if affine else None, norm.eps, given]


CASES = [
    arguments(width, affine, carried, given)
    for width in (24, 768, 1000)
    for affine in (True, False)
    for carried, given in [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF), (HALF, torch.float32)]
]
# Triton's own functions are made for its interpreter when it is imported: in another process.
INTERPRETED = """
import sys, torch
from vlmflow.models.triton_norm import add_norm

def results(states, added, *rest):
    alone = (states, None, *rest)
    return [*add_norm(states, added, *rest), *add_norm(*alone), *add_norm(states, added, *rest, keeps_sum=False)]

torch.save([results(*case) for case in torch.load(sys.argv[1], weights_only=True)], sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[list[torch.Tensor]]:
    """What the kernel gives, as Triton's interpreter runs it on a processor."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "cases.pt")
    command = [sys.executable, "-c", INTERPRETED, str(folder / "cases.pt"), str(folder / "results.pt")]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    found: list[list[torch.Tensor]] = torch.load(folder / "results.pt", weights_only=True)
    return found


def test_the_kernel_gives_the_sum_and_its_norm(interpreted: list[list[torch.Tensor]]) -> None:
    for case, found in zip(CASES, interpreted, strict=True):
        states, added, scale, eps, given = case
        summed, normed, same, alone, _, of_sum = found
        weight, bias = scale or (None, None)
        norm = partial(torch.nn.functional.layer_norm, normalized_shape=states.shape[-1:], eps=eps)
        norm = partial(norm, weight=weight, bias=bias)
        # The interpreter cuts to bfloat16, where a GPU rounds.
        close = partial(torch.testing.assert_close, **dict.fromkeys(("rtol", "atol"), 2e-5 if given != HALF else 0.02))
        torch.testing.assert_close(summed, states + added, rtol=0 if states.dtype != HALF else 2**-7, atol=0)
        assert torch.equal(same, states)
        assert normed.dtype == alone.dtype == of_sum.dtype == given
        close(normed.float(), norm(summed.float()))
        close(alone.float(), norm(states.float()))
        close(of_sum.float(), norm(states.float() + added.float()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("carried", "given"), [(torch.float32, HALF), (HALF, HALF), (HALF, torch.float32)])
def test_without_the_kernel_the_norm_is_computed_in_float32(
    affine: bool, carried: torch.dtype, given: torch.dtype
) -> None:
    plain = layer_norm(64, affine=affine)
    norm = Norm(plain, given)
    states, added = torch.randn(5, 64).to(carried), torch.randn(5, 64).to(HALF)
    summed, normed = norm.add(states, added)
    assert torch.equal(summed, states + added)
    assert torch.equal(normed, plain((states + added).float()).to(given))
    assert torch.equal(norm(states), plain(states.float()).to(given))
    assert torch.equal(norm.of_sum(states, added), normed)


def test_without_triton_a_warning_says_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(module, "_kernel", fails)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)  # there is no CUDA to put them on
    module._works.cache_clear()
    try:
        assert not module._works()
    finally:
        module._works.cache_clear()
    assert "Failed to find C compiler. Please specify via CC" in caplog.text
