"""Judges of waveforms for the vocoder's training; none of this is shipped."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Verdict = tuple[Tensor, list[Tensor]]  # scores, and the features of all layers

PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))  # FFT size, hop


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample (HiFi-GAN, arXiv 2010.05646)."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, 32, 64, 128, 256, 256)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(narrow, wide, (5, 1), (3 if index < 4 else 1, 1), padding=(2, 0)))
            for index, (narrow, wide) in enumerate(pairwise(widths))
        )
        self.judge = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> Verdict:
        """wav [batch, samples]."""
        x = F.pad(wav, (0, -wav.shape[1] % self.period)).unflatten(1, (-1, self.period))[:, None]
        return _judge(x, self.convs, self.judge)


class SpectrumDiscriminator(nn.Module):
    """Looks at a complex spectrogram (UnivNet, arXiv 2106.07889; here with real and imaginary parts)."""

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        width = 32
        strides = ((1, 1), (2, 1), (2, 1), (2, 1), (1, 1))
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(width if index else 2, width, (7, 3), stride, padding=(3, 1)))
            for index, stride in enumerate(strides)
        )
        self.judge = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> Verdict:
        """wav [batch, samples]."""
        with torch.autocast(wav.device.type, enabled=False):
            spectrum = torch.stft(wav.float(), self.n_fft, self.hop, window=self.window, return_complex=True)
            parts = torch.view_as_real(spectrum).permute(0, 3, 1, 2) / self.n_fft**0.5
            x = parts.sign() * (parts.abs() + 1e-5).sqrt()
        return _judge(x, self.convs, self.judge)


class Discriminators(nn.Module):
    """All periods and all resolutions."""

    def __init__(self) -> None:
        super().__init__()
        periods = [PeriodDiscriminator(period) for period in PERIODS]
        self.judges = nn.ModuleList([*periods, *(SpectrumDiscriminator(*sizes) for sizes in RESOLUTIONS)])

    def forward(self, wav: Tensor) -> list[Verdict]:
        return [judge(wav) for judge in self.judges]


def _judge(x: Tensor, convs: nn.ModuleList, judge: nn.Module) -> Verdict:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), 0.1)
        features.append(x)
    return judge(x), features


def discriminator_loss(real: list[Verdict], made: list[Verdict]) -> Tensor:
    """Least squares: 1 for recorded, 0 for made speech."""
    losses = [
        (1 - a.float()).square().mean() + b.float().square().mean() for (a, _), (b, _) in zip(real, made, strict=True)
    ]
    return sum(losses) / len(losses)


def generator_losses(real: list[Verdict], made: list[Verdict]) -> tuple[Tensor, Tensor]:
    """Least squares against 1, and the mean distance of the features relative to their size."""
    adversarial = sum((1 - scores.float()).square().mean() for scores, _ in made) / len(made)
    distances = [
        (a.float() - b.float()).abs().mean() / a.float().abs().mean().clamp(min=1e-4)
        for (_, given), (_, said) in zip(real, made, strict=True)
        for a, b in zip((layer.detach() for layer in given), said, strict=True)
    ]
    return adversarial, sum(distances) / len(distances)
