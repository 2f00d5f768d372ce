"""Sums and norms where there is no kernel for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from vlmflow.models.norm import Norm

HALF = torch.bfloat16


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("carried", "given"), [(torch.float32, HALF), (HALF, HALF), (HALF, torch.float32)])
def test_a_norm_is_computed_in_float32_whatever_it_takes_and_gives(
    affine: bool, carried: torch.dtype, given: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.LayerNorm(64, elementwise_affine=affine).requires_grad_(False)
    if affine:
        plain.weight.uniform_(0.5, 2.0)
        plain.bias.normal_()
    norm = Norm(plain, given)
    states, added, offset = torch.randn(5, 64).to(carried), torch.randn(5, 64).to(HALF), torch.randn(64)
    summed, normed = norm.add(states, added)
    assert torch.equal(summed, states + added)
    # torch's own in bfloat16 may round the last digit another way.
    close = partial(torch.testing.assert_close, rtol=2**-7 if given == HALF else 0, atol=0)
    close(normed, plain((states + added).float()).to(given))
    close(norm(states), plain(states.float()).to(given))
    close(norm(states, offset), plain(states.float() + offset).to(given))
    assert torch.equal(norm.of_sum(states, added), normed)
    for_sums, for_products = norm.carried(states, added, HALF)
    assert torch.equal(for_sums, normed)
    assert torch.equal(for_products, normed.to(HALF))
    assert (for_products is for_sums) == (given == HALF)


def test_of_weights_in_bfloat16_it_is_what_torch_gives() -> None:
    plain = nn.LayerNorm(64).bfloat16().requires_grad_(False)
    states = torch.randn(5, 64).bfloat16()
    assert torch.equal(Norm(plain, HALF)(states), plain(states))
