"""Blocks whose products add to the states, as on a GPU, against those that make new ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmflow.models import blocks as module
from vlmflow.models.blocks import Block, Blocks
from vlmflow.models.linear import PackedLinear
from vlmflow.models.norm import Norm


class PlainLinear(PackedLinear):
    """With weights as they lie on a GPU."""

    def __init__(self, layer: nn.Linear, activation: str | None = None) -> None:
        super().__init__([layer], activation)
        self._packed, self._weight = None, layer.weight.detach()


def made_blocks(num_blocks: int) -> Blocks:
    torch.manual_seed(num_blocks)
    norms = [nn.LayerNorm(32).requires_grad_(False) for _ in range(2 * num_blocks + 1)]
    for norm in norms:
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    blocks = [
        Block(
            2,
            Norm(norms[2 * number]),
            PlainLinear(nn.Linear(32, 96)),
            PlainLinear(nn.Linear(32, 32)),
            Norm(norms[2 * number + 1]),
            PlainLinear(nn.Linear(32, 64), "gelu"),
            PlainLinear(nn.Linear(64, 32)),
        )
        for number in range(num_blocks)
    ]
    return Blocks(blocks, Norm(norms[-1]))


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
@pytest.mark.parametrize("num_kept", [0, 1, None])
@torch.inference_mode()
def test_biases_left_out_of_the_sums_come_with_the_norms(
    monkeypatch: pytest.MonkeyPatch, num_blocks: int, num_kept: int | None
) -> None:
    blocks, states = made_blocks(num_blocks), torch.randn(2, 5, 32)
    visible = torch.tensor([True, True, True, False, True]).expand(2, 1, 1, 5)
    before = states.clone()
    expected, expected_norm = blocks(states, visible)
    assert torch.equal(states, before)
    assert (num_blocks == 0) == torch.equal(expected, before)
    monkeypatch.setattr(module, "can_fuse", lambda _: True)
    found, normed = blocks(states, visible, num_kept)
    torch.testing.assert_close(found, expected[:, :num_kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed, expected_norm, atol=1e-5, rtol=1e-5)
