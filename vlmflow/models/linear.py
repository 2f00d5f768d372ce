"""Linear layers with weights in the order that the processor reads them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

# What can be done while the product is still in the cache, by oneDNN's names; GELU is the exact one.
_FUSED = {"gelu": "gelu", "silu": "swish", None: "none"}


class PackedLinear:
    """``x W^T + b`` of one or more layers side by side, and the activation after it.

    On a processor the weights are packed once for oneDNN: torch packs those of ``nn.Linear`` at every call in bfloat16,
    and in float32 calls MKL, which knows no AVX-512 on processors of AMD. What packs and multiplies are the operators
    of torch's own compiler; where a build lacks them, the ordinary ones are called.

    Attributes:
        bias: (E,) in the weights' dtype.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shift: torch.Tensor | None = None,
    ) -> None:
        """Takes over the weights.

        Args:
            layers: of equal inputs.
            activation: as transformers' configurations name it; None: none.
            dtype: None: that of the layers.
            shift: (D,) what is to be added to every input: the bias takes it over. None: nothing is.

        Raises:
            KeyError: torch's modules have no activation of this name.
        """
        weight = torch.cat([layer.weight.detach() for layer in layers]).to(dtype or layers[0].weight.dtype)
        bias = torch.cat([_bias(layer) for layer in layers])
        if shift is not None:
            bias = bias.float() + weight.float() @ shift.detach().float()
        self.bias = bias.to(weight.dtype)
        self._fused = _FUSED.get(activation)
        self._packed = _pack(weight) if self._fused else None
        self._weight = None if self._packed is not None else weight
        self._activation = _activation(activation)
        # By its tanh formula, off by at most 0.0005, where rounding to bfloat16 may cost 0.004 of what is about 1.
        self._has_gelu = activation == "gelu" and weight.is_cuda and weight.dtype == torch.bfloat16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) in the weights' dtype or float32 -> (..., E) in that of the weights, E the outputs of all layers."""
        x = x.to(self.bias.dtype)
        if self._packed is not None:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self.bias, self._fused, [], "none" if self._fused == "gelu" else ""
            )
            return product
        assert self._weight is not None
        if self._has_gelu:
            # In the product's epilogue: as a pass of its own it takes half as long as the product.
            rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self._weight.t(), use_gelu=True)
            return rows.view(*x.shape[:-1], -1)
        product = nn.functional.linear(x, self._weight, self.bias)
        return product if self._activation is None else self._activation(product)

    def onto(self, states: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of (..., D) to contiguous (..., E) on a GPU, in the weights' dtype; the bias is left out.

        The sum costs no pass of its own, and the product is not rounded before it.
        """
        assert self._weight is not None
        rows = states.flatten(0, -2)
        torch.addmm(rows, x.to(self._weight.dtype).flatten(0, -2), self._weight.t(), out=rows)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T``, with weights that are used too seldom to be kept packed; half of the time where oneDNN is the faster.

    Args:
        x: (..., D), of the dtype of the weights.
        weight: (E, D).
    """
    packed = _pack(weight)
    if packed is None:
        return nn.functional.linear(x, weight)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product


def _bias(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weights in oneDNN's order; None: not on this device, for this dtype, or by this build of torch."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except RuntimeError:  # a processor without the instructions for this dtype
        return None
    return packed


def _activation(name: str | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if name is None:
        return None
    if name == "gelu":
        return nn.functional.gelu
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function
