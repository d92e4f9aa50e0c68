"""Linear layers whose weights are read as float16, where reading them is what takes the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HalfLinear(nn.Linear):
    """A linear layer that multiplies single rows with a float16 copy of its weights, into float32.

    A CPU multiplies a single row as fast as it reads the weights, so half the bytes are nearly half the time. The row
    and what comes out are rounded to float16 on their way.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.half_weight = linear.weight.detach().half()
        self.half_bias = None if linear.bias is None else linear.bias.detach().half()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.numel() != self.in_features:
            return super().forward(x)
        return F.linear(x.half(), self.half_weight, self.half_bias).float()


def read_as_half(module: nn.Module) -> None:
    """Make the linear layers in `module` such ones, if its weights are float32 numbers that float16 has too; those of
    other models would change. To be done last: the float16 copies follow neither `to` nor `load_state_dict`.
    """
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    if all(_fits(parameter) for _, _, layer in layers for parameter in layer.parameters()):
        for parent, name, layer in layers:
            setattr(parent, name, HalfLinear(layer))


def _fits(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and torch.equal(parameter.half().float(), parameter)
