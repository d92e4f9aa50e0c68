"""Resampling keeps length and pitch."""

from __future__ import annotations

import numpy as np
import pytest

from cosy_engine.audio.resample import resample


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_a_tone_stays_a_tone(rate: int) -> None:
    source = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    target = resample(source, rate, 24_000)
    assert target.dtype == np.float32 and len(target) == 24_000
    expected = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    assert np.abs(target - expected)[2_400:-2_400].max() < 1e-3
