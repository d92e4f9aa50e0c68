"""`hift.Snake` as one kernel, where PyTorch needs five: the vocoder has 72 of them, most at the rate of the sound."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from cosy_engine.modules.hift import Snake

_BLOCK = 1024  # frames of a program


@triton.jit(do_not_specialize=["length"])
def _snake(x, alphas, out, x_b, x_c, x_t, channels, length, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = block * BLOCK + tl.arange(0, BLOCK)
    there = t < length
    alpha = tl.load(alphas + row % channels)
    value = tl.load(x + row // channels * x_b + row % channels * x_c + t * x_t, mask=there, other=0.0)
    sine = tl.sin(value * alpha)
    tl.store(out + row * length + t, value + sine * sine / (alpha + 1e-9), mask=there)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """As `Snake.forward`: x [B, channels, T] and alpha [channels] -> [B, channels, T], float32."""
    batch, channels, length = x.shape
    out = x.new_empty(x.shape)
    if out.numel():
        grid = (batch * channels, triton.cdiv(length, _BLOCK))
        _snake[grid](x, alpha, out, x.stride(0), x.stride(1), x.stride(2), channels, length, BLOCK=_BLOCK)
    return out


def use_kernel(hift: nn.Module) -> None:
    """Let all of a vocoder's layers use it."""
    for layer in hift.modules():
        if isinstance(layer, Snake):
            layer.fused = snake


def agrees(device: torch.device) -> bool:
    """Whether this gives what PyTorch gives, up to rounding."""
    layer = Snake(5).to(device)
    layer.alpha.data = torch.linspace(0.1, 9.0, 5, device=device)
    x = torch.linspace(-30, 30, 2 * 5 * 1501, device=device).view(2, 5, 1501)[..., 1:]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return torch.allclose(snake(x, layer.alpha.data), layer(x), atol=1e-4, rtol=1e-5)
