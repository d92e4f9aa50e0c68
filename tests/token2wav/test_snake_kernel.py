"""The Triton kernel in Triton's interpreter and its compiler, which need no GPU."""

from __future__ import annotations

import importlib.util

import pytest

from tests.kernels import AMPERE, HOPPER, compiled, interpreted

AGREES = """
import torch
from cosy_engine.modules.hift import Snake
from cosy_engine.token2wav import snake_kernel
print(snake_kernel.agrees(torch.device("cpu")))
layer = Snake(3)
x = torch.randn(2, 3, 5)
expected = layer(x)
snake_kernel.use_kernel(layer)
print(layer.fused is snake_kernel.snake, torch.allclose(layer(x), expected, atol=1e-6), layer(x[..., :0]).shape[2])
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make setup-vllm"),
]


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_it_compiles_for_gpus(capability: int) -> None:
    from cosy_engine.token2wav.snake_kernel import _snake

    types = dict.fromkeys(("x", "alphas", "out"), "*fp32")
    assert "cubin" in compiled(_snake, capability, types=types, constants={"BLOCK": 1024})


def test_it_gives_what_the_layer_gives() -> None:
    assert interpreted(AGREES) == ["True", "True", "True", "0"]


def test_the_check_notices_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cosy_engine.token2wav import snake_kernel

    monkeypatch.setattr(snake_kernel, "snake", lambda x, alpha: x)
    assert not snake_kernel.agrees(torch.device("cpu"))
