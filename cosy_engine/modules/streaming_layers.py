"""Layers of a waveform generator that can be fed in chunks of any length.

Each takes `(x, state, finalize=...)` and returns every output that later input cannot change, so outputs lag behind
inputs by what the layer looks ahead; `finalize=True` says that the input ends here and returns the rest. A fresh state
is an empty dict: start and end of the stream are padded as in the whole-sequence layer. `ready(n)` is the number of
outputs returned once n inputs have been fed.

Rows of a batch may end at different places of a later call that does not finalize: whoever calls puts `end` into the
states of the convolutions and transforms, int64 [B], the number of this call's inputs that come before the row's end.
Up to its end a row then gets what `finalize` would return; what follows is to be cut off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cosy_engine.modules.streaming import State


def substate(state: State, name: str) -> State:
    """The part of `state` that belongs to the child `name`."""
    return state.setdefault(name, {})


def join(held: Tensor | None, x: Tensor) -> Tensor:
    """`held` followed by `x` along the last axis."""
    return x if held is None or held.shape[-1] == 0 else torch.cat([held, x], dim=-1)


def comes_before(end: Tensor, length: int) -> Tensor:
    """Which of a call's `length` inputs come before each row's `end` [B]: bool [B, length]."""
    return torch.arange(length, device=end.device) < end[:, None]


def until_end(x: Tensor, state: State) -> Tensor:
    """x [B, channels, T] with zeros after each row's end, if the state has one."""
    end = state.pop("end", None)
    return x if end is None else x * comes_before(end, x.shape[-1])[:, None].to(x.dtype)


def align(streams: list[Tensor], state: State) -> list[Tensor]:
    """Cut streams of different delay to the part that all have reached, and hold the surplus for the next call."""
    joined = [join(state.get(str(index)), stream) for index, stream in enumerate(streams)]
    common = min(stream.shape[-1] for stream in joined)
    for index, stream in enumerate(joined):
        state[str(index)] = stream[..., common:].clone()  # a view would keep all of the stream alive
    return [stream[..., :common] for stream in joined]


def overlap_add(segments: Tensor, overlap: int, trim: int, state: State, finalize: bool) -> Tensor:
    """Add the last `overlap` values of the previous call to the first ones of this call.

    Args:
        segments: [..., n + overlap], sums of this call's segments, of which later calls can change the last `overlap`.
        trim: values to cut off at the start and at the end of the stream.
    """
    if "overlap" in state:
        segments = segments + F.pad(state["overlap"], (0, segments.shape[-1] - overlap))
    skip = state.get("skip", trim)
    end = segments.shape[-1] - (trim if finalize else overlap)
    state["overlap"] = segments[..., segments.shape[-1] - overlap :].clone()
    state["skip"] = max(0, skip - end)
    return segments[..., min(skip, end) : end]


def fold_weight_norm(module: nn.Module) -> None:
    """Replace every weight norm below `module` by the plain weight; for inference, after loading."""
    for child in list(module.modules()):
        if parametrize.is_parametrized(child, "weight"):
            parametrize.remove_parametrizations(child, "weight")


class StreamingConv1d(nn.Conv1d):
    """Conv1d over x with `left` zeros before the first frame and `right` zeros after the last.

    With `upsample`, each input frame is repeated that many times first. Computes in the precision of x, whatever the
    precision of the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        left: int,
        right: int,
        stride: int = 1,
        dilation: int = 1,
        upsample: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation)
        self.left, self.right, self.upsample = left, right, upsample
        self.span = (kernel_size - 1) * dilation + 1

    def ready(self, n: int) -> int:
        return max(0, (self.upsample * n + self.left - self.span) // self.stride[0] + 1)

    def forward(self, x: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T']."""
        state = {} if state is None else state
        if self.right:
            x = until_end(x, state)
        else:  # what comes before the end does not depend on what follows
            state.pop("end", None)
        if self.upsample > 1:
            x = x.repeat_interleave(self.upsample, dim=-1)
        pad = (0 if "tail" in state else self.left, self.right if finalize else 0)
        x = join(state.get("tail"), x)
        if any(pad):
            x = F.pad(x, pad)
        n_out = max(0, (x.shape[-1] - self.span) // self.stride[0] + 1)
        state["tail"] = x[..., n_out * self.stride[0] :].clone()
        if n_out == 0:
            return x.new_zeros(x.shape[0], self.out_channels, 0)
        return F.conv1d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, dilation=self.dilation)


class StreamingConvTranspose1d(nn.ConvTranspose1d):
    """ConvTranspose1d that multiplies the length by `stride`; `trim` outputs are cut off at both ends."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.overlap = kernel_size - stride
        self.trim = self.overlap // 2

    def ready(self, n: int) -> int:
        return max(0, n * self.stride[0] - self.trim)

    def forward(self, x: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T * stride]."""
        state = {} if state is None else state
        x = until_end(x, state)
        if x.shape[-1]:
            segments = F.conv_transpose1d(x, self.weight, stride=self.stride)
        else:
            segments = x.new_zeros(x.shape[0], self.out_channels, self.overlap)
        return overlap_add(segments, self.overlap, self.trim, state, finalize) + self.bias[:, None]


class ReflectStart(nn.Module):
    """Puts the mirror image of frames 1..pad before frame 0."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def ready(self, n: int) -> int:
        return n + self.pad if n > self.pad else 0

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """[..., T] -> [..., pad + T]; nothing until more than `pad` frames have come."""
        state = {} if state is None else state
        if state.get("started"):
            return x
        x = join(state.pop("held", None), x)
        if x.shape[-1] <= self.pad:
            state["held"] = x
            return x[..., :0]
        state["started"] = 1
        return torch.cat([x[..., 1 : self.pad + 1].flip(-1), x], dim=-1)


def _reflect_end(x: Tensor, end: Tensor) -> Tensor:
    """x [B, T] with its mirror image after each row's last value, the one before `end` [B]."""
    position, last = torch.arange(x.shape[-1], device=x.device), end[:, None] - 1
    return x.gather(1, torch.where(position <= last, position, 2 * last - position).clamp(min=0))


class STFT(nn.Module):
    """torch.stft with a periodic Hann window and centred, reflected frames; real parts, then imaginary parts."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.start = ReflectStart(n_fft // 2)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def ready(self, n: int) -> int:
        return max(0, (self.start.ready(n) - self.n_fft) // self.hop + 1)

    def forward(self, x: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """[B, N] -> [B, n_fft + 2, N // hop + 1]."""
        state = {} if state is None else state
        new, end = x.shape[-1], state.pop("end", None)
        x = join(state.get("tail"), self.start(x, substate(state, "start")))
        if end is not None:
            x = _reflect_end(x, x.shape[-1] - new + end)
        if finalize:
            x = torch.cat([x, x[..., -self.n_fft // 2 - 1 : -1].flip(-1)], dim=-1)
        n_out = max(0, (x.shape[-1] - self.n_fft) // self.hop + 1)
        state["tail"] = x[..., n_out * self.hop :].clone()
        if n_out == 0:
            return x.new_zeros(x.shape[0], self.n_fft + 2, 0)
        spectrum = torch.fft.rfft(x.unfold(-1, self.n_fft, self.hop) * self.window)
        return torch.cat([spectrum.real, spectrum.imag], dim=-1).transpose(1, 2)


class InverseSTFT(nn.Module):
    """torch.istft of a centred STFT with a periodic Hann window."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def ready(self, n: int) -> int:
        return max(0, n * self.hop - self.n_fft // 2)

    def forward(self, magnitude: Tensor, phase: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """magnitude and phase (radians), both [B, n_fft / 2 + 1, T] -> [B, (T - 1) * hop]."""
        state = {} if state is None else state
        if magnitude.shape[-1]:
            frames = torch.fft.irfft(torch.polar(magnitude, phase), self.n_fft, dim=1) * self.window[:, None]
        else:
            frames = magnitude.new_zeros(magnitude.shape[0], self.n_fft, 0)
        envelope = self.window.square()[None, :, None].expand(len(frames), -1, frames.shape[-1])
        if (end := state.pop("end", None)) is not None:
            alive = comes_before(end, frames.shape[-1])[:, None].to(frames.dtype)
            frames, envelope = frames * alive, envelope * alive
        signal = self._overlap_add(frames, substate(state, "signal"), finalize)
        return signal / self._overlap_add(envelope, substate(state, "envelope"), finalize)

    def _overlap_add(self, frames: Tensor, state: State, finalize: bool) -> Tensor:
        overlap = self.n_fft - self.hop
        length = frames.shape[-1] * self.hop + overlap
        if frames.shape[-1]:
            segments = F.fold(frames, (1, length), (1, self.n_fft), stride=(1, self.hop)).flatten(1)
        else:
            segments = frames.new_zeros(frames.shape[0], overlap)
        return overlap_add(segments, overlap, self.n_fft // 2, state, finalize)
