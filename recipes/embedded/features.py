"""The engine's acoustic features for batches on the GPU, plus pitch. Waveforms are float32 [batch, samples] in -1..1.

The numbers are those of cosy_engine/audio/features.py for one unpadded row. In a padded batch give `lengths`, so that a
row's normalisation ignores its padding.
"""

from __future__ import annotations

from functools import lru_cache
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 24000
HOP = 480  # samples of a mel frame
FRAME_RATE = SAMPLE_RATE // HOP
CODE_HOP = 960  # samples of a speech code
MEAN_MEL = -6.0  # about the mean of the log-mel; layers that end in mel start there


def mel_24k(wav: Tensor) -> Tensor:
    """Log-mel [batch, 80, samples // 480] of 24 kHz speech: 0 to 8000 Hz, window 1920, hop 480."""
    padded = F.pad(wav[:, None], (720, 720), mode="reflect")[:, 0]
    return mel_24k_padded(padded)


def mel_24k_padded(padded: Tensor) -> Tensor:
    """As `mel_24k`, of a waveform that brings 720 samples of context at either side."""
    return log_mel(padded, 1920, HOP, 80, 8000.0)


def log_mel(wav: Tensor, n_fft: int, hop: int, bins: int, high: float) -> Tensor:
    """Log of the Slaney mel magnitudes [batch, bins, frames] at 24 kHz, without padding."""
    spectrum = torch.stft(wav, n_fft, hop, window=_hann(n_fft, wav.device), center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (slaney_filters(SAMPLE_RATE, n_fft, bins, high, wav.device) @ magnitude).clamp(min=1e-5).log()


def whisper_log_mel(wav: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Whisper's log-mel [batch, 128, samples // 160] of 16 kHz speech; `lengths` [batch] in samples."""
    spectrum = torch.stft(wav, 400, 160, window=_hann(400, wav.device), return_complex=True)[..., :-1]
    mel = slaney_filters(16000, 400, 128, 8000.0, wav.device) @ spectrum.abs().square()
    mel = mel.clamp(min=1e-10).log10()
    counted = mel
    if lengths is not None:
        frames = torch.arange(mel.shape[2], device=wav.device)
        counted = mel.masked_fill(frames >= (lengths // 160)[:, None, None], -10.0)
    return (torch.maximum(mel, counted.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def kaldi_fbank(wav: Tensor) -> Tensor:
    """Kaldi's 80-bin log filter bank [batch, frames, 80] of 16 kHz speech, without dither."""
    frames = wav.unfold(1, 400, 160)
    frames = frames - frames.mean(2, keepdim=True)
    frames = frames - 0.97 * F.pad(frames, (1, 0), mode="replicate")[..., :-1]
    window = torch.hann_window(400, periodic=False, device=wav.device).pow(0.85)
    power = torch.fft.rfft(frames * window, 512).abs().square()
    return (power[..., :256] @ _kaldi_filters(wav.device)).clamp(min=torch.finfo(torch.float32).eps).log()


def resample(wav: Tensor, length: int) -> Tensor:
    """The same signal in `length` samples: an ideal band-limited resampling of the periodic continuation."""
    spectrum = torch.fft.rfft(wav)
    bins = length // 2 + 1
    spectrum = F.pad(spectrum, (0, max(0, bins - spectrum.shape[1])))[:, :bins]
    return torch.fft.irfft(spectrum, length) * (length / wav.shape[1])


def pitch(wav: Tensor, threshold: float = 0.2, unvoiced: float = 0.45) -> Tensor:
    """Pitch in Hz [batch, samples // 480], 0 where unvoiced, 60 to 500 Hz, by YIN (de Cheveigne and Kawahara, 2002), at
    the middle of each mel frame."""
    rate, window, longest, shortest = 12000, 512, 200, 24
    before = 180  # samples at `rate` from the start of what is compared to the frame's start
    frames_out = wav.shape[1] // HOP
    low = _low_pass(resample(wav, wav.shape[1] // 2), 1100 / (rate / 2))
    low = F.pad(low, (before, window + longest - before))
    hop = HOP * rate // SAMPLE_RATE
    frames = low.unfold(1, window + longest, hop)[:, :frames_out]
    frames = F.pad(frames, (0, 0, 0, frames_out - frames.shape[1]))
    head = torch.fft.rfft(frames[..., :window], 1024)
    product = torch.fft.irfft(head.conj() * torch.fft.rfft(frames, 1024), 1024)[..., : longest + 1]
    energy = F.pad(frames.square().cumsum(2), (1, 0))
    energy = energy[..., window:] - energy[..., : longest + 1]
    difference = (energy[..., :1] + energy - 2 * product).clamp(min=0)[..., 1:]
    lag = torch.arange(1, longest + 1, device=wav.device)
    normal = difference * lag / difference.cumsum(2).clamp(min=1e-9)
    candidates = normal[..., shortest:-1]
    dip = (candidates < threshold) & (candidates <= normal[..., shortest + 1 :])
    first = torch.where(dip.any(2), dip.float().argmax(2), candidates.argmin(2)) + shortest
    around = torch.stack([normal.gather(2, (first + step)[..., None])[..., 0] for step in (-1, 0, 1)])
    curve = around[0] - 2 * around[1] + around[2]
    offset = torch.where(curve > 1e-6, 0.5 * (around[0] - around[2]) / curve.clamp(min=1e-6), 0).clamp(-0.5, 0.5)
    f0 = rate / (first + 1 + offset)
    voiced = (around[1] < unvoiced) & (energy[..., 0] > window * 1e-5)
    f0 = torch.where(voiced, f0, 0)
    return F.pad(f0[:, None], (1, 1), mode="replicate")[:, 0].unfold(1, 3, 1).median(2).values


def _low_pass(wav: Tensor, cut: float) -> Tensor:
    """`wav` without what lies above `cut` of its bandwidth; the edge is a fifth of `cut` wide."""
    spectrum = torch.fft.rfft(wav)
    frequency = torch.linspace(0, 1, spectrum.shape[1], device=wav.device)
    return torch.fft.irfft(spectrum * ((1.1 * cut - frequency) / (0.2 * cut)).clamp(0, 1), wav.shape[1])


@lru_cache
def _hann(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length, device=device)


@lru_cache
def slaney_filters(rate: int, n_fft: int, bins: int, high: float, device: torch.device) -> Tensor:
    """Triangular mel filters [bins, n_fft // 2 + 1] of unit area, on Slaney's scale (linear to 1 kHz, then log)."""
    step, log_step = 200 / 3, log(6.4) / 27

    def to_hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * step, 1000 * torch.exp(log_step * (mel - 15)))

    top = high / step if high < 1000 else 15 + log(high / 1000) / log_step
    edges = to_hertz(torch.linspace(0, top, bins + 2, dtype=torch.float64))
    frequency = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.float().to(device)


@lru_cache
def _kaldi_filters(device: torch.device) -> Tensor:
    """[256, 80]: triangles on the scale 1127 ln(1 + f / 700), from 20 Hz to 8 kHz, linear in mel."""

    def to_mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz / 700)

    low, high = to_mel(torch.tensor([20.0, 8000.0], dtype=torch.float64))
    edges = torch.linspace(float(low), float(high), 82, dtype=torch.float64)
    mel = to_mel(torch.arange(256, dtype=torch.float64) * 16000 / 512)[:, None]
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float().to(device)
