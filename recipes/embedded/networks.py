"""The two networks that the engine runs from ONNX files, and the block they are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES = 6561  # 3 ** 8
DIGITS = 8


class ConvBlock(nn.Module):
    """ConvNeXt block over time (arXiv 2201.03545): depthwise convolution, LayerNorm, two pointwise layers, residual."""

    def __init__(self, width: int, kernel: int = 7, expansion: int = 2, dilation: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 * dilation
        self.depthwise = nn.Conv1d(width, width, kernel, padding=padding, groups=width, dilation=dilation)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, width, frames], mask [batch, 1, frames] or None -> [batch, width, frames]."""
        y = x if mask is None else x * mask
        y = self.norm(self.depthwise(y).transpose(1, 2))
        y = self.narrow(F.gelu(self.widen(y))) * self.scale
        return x + y.transpose(1, 2)


def frame_mask(length: Tensor, frames: Tensor | int, like: Tensor) -> Tensor:
    """[batch, 1, frames]: 1 before `length` [batch], 0 after."""
    return (torch.arange(frames, device=like.device) < length[:, None])[:, None].to(like.dtype)


class SpeechTokenizer(nn.Module):
    """Whisper log-mel at 100 Hz -> finite scalar quantisation (arXiv 2309.15505), 8 digits of 3 levels, at 25 Hz.

    The mean over time, which holds voice and microphone, is shown to every frame so that it can be taken out. Each
    digit is standardised over the batch before it is rounded, so that all of its levels are used about as often.
    """

    def __init__(self, width: int = 224, blocks: int = 6) -> None:
        super().__init__()
        self.enter = nn.Conv1d(128, width, 3, stride=2, padding=1)
        self.first = ConvBlock(width)
        self.halve = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.overall = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList([ConvBlock(width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, DIGITS)
        self.balance = nn.BatchNorm1d(DIGITS, affine=False)
        self.register_buffer("powers", 3 ** torch.arange(DIGITS), persistent=False)

    def digits(self, features: Tensor, length: Tensor) -> Tensor:
        """[batch, 128, frames], int [batch] frames -> values in -1..1 before rounding, [batch, ceil(frames / 4), 8]."""
        x = F.gelu(self.enter(features * frame_mask(length, features.shape[2], features)))
        half = (length + 1) // 2
        x = self.first(x, frame_mask(half, x.shape[2], x))
        x = self.halve(x * frame_mask(half, x.shape[2], x))
        mask = frame_mask((half + 1) // 2, x.shape[2], x)
        count = mask.sum(2)
        mean = (x * mask).sum(2) / count
        spread = (((x - mean[:, :, None]).square() * mask).sum(2) / count + 1e-5).sqrt()
        x = x + self.overall(torch.cat([mean, spread], dim=1))[:, :, None]
        for block in self.blocks:
            x = block(x, mask)
        digits = self.project(self.norm(x.transpose(1, 2))).float()
        return torch.tanh(1.25 * self.balance(digits.flatten(0, 1)).view_as(digits))

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        """Codes int32 [batch, ceil(frames / 4)]; those past a row's length mean nothing."""
        return ((torch.round(self.digits(features, length)) + 1) * self.powers).sum(2).to(torch.int32)


def code_digits(codes: Tensor) -> Tensor:
    """Codes [...] -> their eight digits, 0 to 2: int64 [..., 8]."""
    return codes.long()[..., None] // 3 ** torch.arange(DIGITS, device=codes.device) % 3


class SpeakerEncoder(nn.Module):
    """Filter bank minus its mean [batch, frames, 80] -> 192 numbers a row: convolutions, then attentive statistics."""

    def __init__(self, width: int = 160, blocks: int = 5) -> None:
        super().__init__()
        self.enter = nn.Conv1d(80, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList([ConvBlock(width, dilation=1 + index % 3) for index in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.attend = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))
        self.project = nn.Linear(2 * width, 192)

    def forward(self, fbank: Tensor) -> Tensor:
        x = F.gelu(self.enter(fbank.transpose(1, 2)))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.transpose(1, 2))
        weights = self.attend(x).softmax(1)
        mean = (weights * x).sum(1)
        spread = ((weights * (x - mean[:, None]).square()).sum(1) + 1e-5).sqrt()
        return self.project(torch.cat([mean, spread], dim=1))
