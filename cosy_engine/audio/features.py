"""The three spectral features that the models take: 24 kHz mel, Whisper's log-mel, Kaldi's filter bank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import kaldi_native_fbank
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WHISPER_RATE = FBANK_RATE = 16_000


@dataclass(frozen=True)
class MelSettings:
    """The `feat_extractor` of a model's configuration; `fmax` None is half the sampling rate."""

    n_fft: int = 1920
    num_mels: int = 80
    sampling_rate: int = 24_000
    hop_size: int = 480
    win_size: int = 1920
    fmin: float = 0
    fmax: float | None = 8000
    center: bool = False


def mel_spectrogram(wav: Tensor, settings: MelSettings) -> Tensor:
    """Log-mel that the flow takes and the vocoder turns into sound.

    Args:
        wav: float32 [1, n] at `settings.sampling_rate`, longer than half a window.

    Returns:
        float32 [1, num_mels, n // hop_size]
    """
    margin = (settings.n_fft - settings.hop_size) // 2
    padded = F.pad(wav.unsqueeze(1), (margin, margin), mode="reflect").squeeze(1)
    spectrum = torch.stft(
        padded,
        settings.n_fft,
        settings.hop_size,
        settings.win_size,
        window=torch.hann_window(settings.win_size),
        center=settings.center,
        return_complex=True,
    )
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    filters = mel_filters(settings.sampling_rate, settings.n_fft, settings.num_mels, settings.fmin, settings.fmax)
    return torch.log((filters @ magnitude).clamp(min=1e-5))


def whisper_log_mel(wav: Tensor, num_mels: int = 128) -> Tensor:
    """Log-mel of the Whisper models, without their padding to 30 s.

    Args:
        wav: float32 [1, n] at 16 kHz.

    Returns:
        float32 [1, num_mels, n // 160]
    """
    spectrum = torch.stft(wav, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = spectrum[..., :-1].abs().square()
    log_mel = (mel_filters(WHISPER_RATE, 400, num_mels, 0, None) @ power).clamp(min=1e-10).log10()
    return (log_mel.maximum(log_mel.max() - 8) + 4) / 4


def kaldi_fbank(wav: Tensor, num_mels: int = 80) -> Tensor:
    """Kaldi's log filter bank with its default settings (25 ms Povey windows every 10 ms) and no dither.

    Args:
        wav: float32 [1, n] at 16 kHz in -1..1.

    Returns:
        float32 [frames, num_mels]
    """
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = FBANK_RATE
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = num_mels
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(FBANK_RATE, wav[0].tolist())
    computer.input_finished()
    frames = [computer.get_frame(i) for i in range(computer.num_frames_ready)]
    return torch.from_numpy(np.stack(frames)) if frames else torch.zeros(0, num_mels)


@cache
def mel_filters(sample_rate: int, n_fft: int, num_mels: int, fmin: float, fmax: float | None) -> Tensor:
    """Triangular filters, equally spaced on Slaney's mel scale, each with unit area (Auditory Toolbox, 1998).

    Returns:
        float32 [num_mels, n_fft // 2 + 1]
    """
    limits = _to_mel(np.array([fmin, sample_rate / 2 if fmax is None else fmax]))
    edges = _to_hertz(np.linspace(*limits, num_mels + 2))[:, None]
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clip(min=0)
    return torch.from_numpy((triangles * 2 / (high - low)).astype(np.float32))


# Slaney's scale: linear up to 1000 Hz (15 mel), from there a factor of 6.4 every 27 mel.
_LINEAR_END, _MEL_AT_END, _MEL_PER_LOG = 1000.0, 15.0, 27 / np.log(6.4)


def _to_mel(hertz: np.ndarray) -> np.ndarray:
    linear = hertz * _MEL_AT_END / _LINEAR_END
    return np.where(
        hertz < _LINEAR_END, linear, _MEL_AT_END + _MEL_PER_LOG * np.log(np.maximum(hertz, 1e-9) / _LINEAR_END)
    )


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    linear = mel * _LINEAR_END / _MEL_AT_END
    return np.where(mel < _MEL_AT_END, linear, _LINEAR_END * np.exp((mel - _MEL_AT_END) / _MEL_PER_LOG))
