"""Layers that read float16 weights for single rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cosy_engine.modules.half_linear import HalfLinear, read_as_half


def block() -> nn.Module:
    """Two layers whose weights float16 has too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).half().float()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64)])
def test_a_single_row_differs_by_the_rounding_of_float16(shape: tuple[int, ...]) -> None:
    plain = block()
    halved = copy.deepcopy(plain)
    read_as_half(halved)
    x = torch.randn(shape)
    assert halved(x).dtype == torch.float32
    difference = (halved(x) - plain(x)).abs().max()
    assert 0 < difference < 4e-3 * plain(x).abs().max()


@pytest.mark.parametrize("shape", [(3, 64), (2, 1, 64), (1, 5, 64)])
def test_several_rows_are_as_before(shape: tuple[int, ...]) -> None:
    plain = block()
    halved = copy.deepcopy(plain)
    read_as_half(halved)
    x = torch.randn(shape)
    assert torch.equal(halved(x), plain(x))


def other_weights(module: nn.Module) -> None:
    module[0].weight.data[0, 0] = 0.1  # not a number of float16


def other_dtype(module: nn.Module) -> None:
    module.bfloat16()


@pytest.mark.parametrize("change", [other_weights, other_dtype])
def test_weights_that_would_change_are_left_alone(change: object) -> None:
    module = block()
    change(module)
    read_as_half(module)
    assert not any(isinstance(layer, HalfLinear) for layer in module.modules())


def test_names_and_values_of_the_weights_stay() -> None:
    def weights(module: nn.Module) -> dict[str, Tensor]:
        return dict(module.state_dict())

    plain = block()
    halved = copy.deepcopy(plain)
    read_as_half(halved)
    assert weights(halved).keys() == weights(plain).keys()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(halved).items())
