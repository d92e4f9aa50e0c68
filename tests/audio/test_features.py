"""Features against what is known of simple sounds; the golden replay compares whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosy_engine.audio.features import MelSettings, kaldi_fbank, mel_filters, mel_spectrogram, whisper_log_mel


def tone(frequency: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * rate)) / rate)[None]


@pytest.mark.parametrize("samples", [24_000, 24_001, 24_479])
def test_shapes(samples: int) -> None:
    assert mel_spectrogram(torch.zeros(1, samples), MelSettings()).shape == (1, 80, samples // 480)
    assert whisper_log_mel(torch.zeros(1, samples)).shape == (1, 128, samples // 160)
    assert kaldi_fbank(torch.zeros(1, samples)).shape == ((samples - 400) // 160 + 1, 80)
    assert kaldi_fbank(torch.zeros(1, 399)).shape == (0, 80)


@pytest.mark.parametrize(("fmax", "expected"), [(8000, 62), (None, 55)])
def test_a_tone_lies_in_the_bin_that_slaneys_scale_gives(fmax: float | None, expected: int) -> None:
    # 4 kHz is 35.16 mel; 81 steps lead to 45.25 mel (8 kHz) or 51.14 mel (12 kHz); bin k peaks at step k + 1
    mel = mel_spectrogram(tone(4000, 24_000), MelSettings(fmax=fmax))
    assert mel[0, :, 25].argmax() == expected


def test_silence_is_at_the_floor() -> None:
    assert mel_spectrogram(torch.zeros(1, 4800), MelSettings()).max() == pytest.approx(np.log(1e-5))
    assert whisper_log_mel(torch.zeros(1, 4800)).max() == pytest.approx((-10 + 4) / 4)


def test_whisper_range_is_eight_decades() -> None:
    log_mel = whisper_log_mel(tone(440, 16_000))
    assert log_mel.max() - log_mel.min() <= 2


def test_filters_have_unit_area() -> None:
    filters = mel_filters(24_000, 1920, 80, 0, 8000)
    assert filters.shape == (80, 961)
    assert torch.allclose(filters.sum(dim=1) * 12.5, torch.ones(80), atol=0.1)


def test_ten_times_the_amplitude_is_a_hundred_times_the_power() -> None:
    noise = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    difference = kaldi_fbank(noise * 10) - kaldi_fbank(noise)
    assert torch.allclose(difference, torch.full_like(difference, np.log(100.0)), atol=1e-3)
