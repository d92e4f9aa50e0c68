"""Faster and slower speech: the mel is stretched in time before the vocoder, so the pitch stays."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def change_speed(mel: Tensor, speed: float) -> Tensor:
    """Stretch a whole mel `[1, 80, n]` to `int(n / speed)` frames, linearly, as the public code does."""
    if speed == 1.0 or mel.shape[2] == 0:
        return mel
    frames = max(1, int(mel.shape[2] / speed))
    return F.interpolate(mel, size=frames, mode="linear")


class StreamingSpeed:
    """The same for a mel that arrives in chunks: output frame `i` lies at input frame `(i + 0.5) * speed - 0.5`."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._seen = 0
        self._emitted = 0
        self._tail: Tensor | None = None

    def push(self, mel: Tensor, *, finalize: bool) -> Tensor:
        """Frames `[1, 80, m]` of the output that the input so far, `[1, 80, n]` more of it, determines."""
        if self.speed == 1.0:
            return mel
        known = mel if self._tail is None else torch.cat([self._tail, mel], dim=2)
        self._seen += mel.shape[2]
        first, last = self._seen - known.shape[2], self._seen - 1
        end = int(self._seen / self.speed) if finalize else math.floor((last + 0.5) / self.speed - 0.5) + 1
        frames = torch.arange(self._emitted, max(end, self._emitted), device=mel.device, dtype=torch.float64)
        positions = ((frames + 0.5) * self.speed - 0.5).clamp(0, max(last, 0))
        left = positions.floor().long()
        right = (left + 1).clamp(max=max(last, 0))
        weight = (positions - left).to(mel.dtype)
        out = known[:, :, left - first] * (1 - weight) + known[:, :, right - first] * weight
        self._emitted += len(frames)
        next_position = max(0, math.floor((self._emitted + 0.5) * self.speed - 0.5))
        self._tail = known[:, :, min(next_position, last) - first :] if self._seen else known
        return out
