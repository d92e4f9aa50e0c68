"""A convolution over time that never looks ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosy_engine.modules.streaming import State


class CausalConv1d(nn.Conv1d):
    """`nn.Conv1d` with stride 1 whose output frame i sees the input frames i-kernel_size+1 ... i.

    State: `tail [B, in_channels, kernel_size-1]`, the last input frames; zeros before the first. If there is a
    `count [B]` too, only so many of the frames fed are no padding.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups=groups)

    def init_own_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch_size, self.in_channels, self.kernel_size[0] - 1)
        return {"tail": torch.zeros(shape, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """`[B, in_channels, T]` -> `[B, out_channels, T]`."""
        batch, channels, frames = x.shape
        tail = x.new_zeros(batch, channels, self.kernel_size[0] - 1) if state is None else state["tail"]
        x = torch.cat([tail, x], dim=2)
        if state is not None:  # a view would keep all of x alive
            state["tail"] = x[:, :, frames:].clone() if "count" not in state else self._last(x, state["count"])
        return super().forward(x)

    def _last(self, x: Tensor, count: Tensor) -> Tensor:
        index = count[:, None, None] + torch.arange(self.kernel_size[0] - 1, device=x.device)
        return x.gather(2, index.expand(-1, x.shape[1], -1))
