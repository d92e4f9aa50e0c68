"""Embedding of the flow's time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SCALE = 1000.0  # time runs from 0 to 1, the embedding was made for steps 0 ... 1000


def embed_time(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of the time at geometric frequencies from 1 to 1/10000: `[B]` -> `[B, dim]` float32."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angle = _SCALE * t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
