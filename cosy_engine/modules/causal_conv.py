"""A convolution over time that never looks ahead, for the two orders of a sequence's axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.streaming import State


class _CausalConv(nn.Conv1d):
    """`nn.Conv1d` with stride 1 whose output frame i sees the input frames i-kernel_size+1 ... i.

    State: `tail`, the last kernel_size-1 input frames; zeros before the first. If there is a `next_tail
    [B, kernel_size-1]` too, the frames fed end in padding, and it says which of the tail and the frames fed are the
    next tail.
    """

    time_axis: int

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups=groups)

    def init_own_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = [batch_size, self.in_channels, self.in_channels]
        shape[self.time_axis] = self.kernel_size[0] - 1
        return {"tail": torch.zeros(shape, device=device, dtype=dtype)}

    def _after_tail(self, x: Tensor, state: State | None) -> Tensor:
        """The tail and `x` behind it; the state's tail becomes the next one."""
        axis, frames, width = self.time_axis, x.shape[self.time_axis], self.kernel_size[0] - 1
        if state is None:
            return F.pad(x, (0, 0) * (2 - axis) + (width, 0))
        x = torch.cat([state["tail"], x], dim=axis)
        if "next_tail" in state:
            state["tail"] = torch.take_along_dim(x, state["next_tail"].unsqueeze(3 - axis), dim=axis)
        else:
            state["tail"] = x.narrow(axis, frames, width).clone()  # a view would keep all of x alive
        return x


class CausalConv1d(_CausalConv):
    """`[B, in_channels, T]` -> `[B, out_channels, T]`; `tail [B, in_channels, kernel_size-1]`."""

    time_axis = 2

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return super().forward(self._after_tail(x, state))


class CausalFrameConv1d(_CausalConv):
    """The same for `[B, T, in_channels]` -> `[B, T, out_channels]`; `tail [B, kernel_size-1, in_channels]`."""

    time_axis = 1

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return _convolve_frames(self, self._after_tail(x, state))


class FrameConv1d(nn.Conv1d):
    """A convolution without padding, for `[B, T, in_channels]` -> `[B, T-kernel_size+1, out_channels]`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve_frames(self, x)


def _convolve_frames(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """One product of matrices: each frame is laid out beside those before it. For narrow kernels.

    On a CPU a row's result then hardly depends on the other rows of the batch, unlike a convolution's.
    """
    if conv.kernel_size[0] == 1:
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    if torch.compiler.is_exporting():  # whatever runs the graph knows convolutions
        return F.conv1d(x.transpose(1, 2), conv.weight, conv.bias).transpose(1, 2)
    seen = x.unfold(1, conv.kernel_size[0], 1)  # [B, T, in_channels, kernel_size]
    return F.linear(seen.flatten(2), conv.weight.flatten(1), conv.bias)
