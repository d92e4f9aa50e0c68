from __future__ import annotations

import numpy as np
import pytest

from cosy_engine.audio.decode import Recording
from cosy_engine.audio.quality import assess, clipped_share, frame_levels, voice_level
from tests.recordings import hum

RATE = 16000


def syllables(seconds: float = 6.0, level: float = 1.0) -> np.ndarray:
    """A hum in bursts of 0.3 s with pauses of 0.1 s."""
    sound = hum(seconds, RATE) * level
    return np.where(np.arange(len(sound)) % (0.4 * RATE) < 0.3 * RATE, sound, 0.0).astype(np.float32)


def noise(count: int, rms_db: float) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(count) * 10 ** (rms_db / 20)).astype(np.float32)


def grades(samples: np.ndarray) -> dict[str, str]:
    return {finding.aspect: finding.grade for finding in assess(Recording(samples.astype(np.float32), RATE))}


def value(samples: np.ndarray, aspect: str) -> float:
    return next(f.value for f in assess(Recording(samples, RATE)) if f.aspect == aspect)


def test_a_good_recording_is_good_in_every_way() -> None:
    assert set(grades(syllables()).values()) == {"good"}


@pytest.mark.parametrize(
    ("seconds", "grade"), [(0.5, "poor"), (2.0, "fair"), (6.0, "good"), (20.0, "fair"), (35.0, "poor")]
)
def test_length(seconds: float, grade: str) -> None:
    assert grades(syllables(seconds))["length"] == grade


def test_length_leaves_out_silence_at_both_ends() -> None:
    padded = np.concatenate([np.zeros(2 * RATE), hum(4.0, RATE), np.zeros(3 * RATE)]).astype(np.float32)
    assert value(padded, "length") == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize(("level", "grade"), [(1.0, "good"), (0.03, "fair"), (0.003, "poor")])
def test_level(level: float, grade: str) -> None:
    assert grades(syllables(level=level))["level"] == grade


def test_level_of_a_full_scale_sine_is_3_db_below_full_scale() -> None:
    sine = np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE).astype(np.float32)
    assert voice_level(frame_levels(Recording(sine, RATE))) == pytest.approx(-3.01, abs=0.01)


def test_clipping_counts_flat_tops_and_not_single_peaks() -> None:
    assert clipped_share(np.array([0, 1, 0, 1, 1, 0, -1, -1, -1, 0], np.float32)) == 0.3
    assert grades(np.clip(syllables() * 5, -1, 1))["clipping"] != "good"
    assert grades(np.clip(syllables() * 20, -1, 1))["clipping"] == "poor"


@pytest.mark.parametrize(("distance", "grade"), [(40, "good"), (18, "fair"), (5, "poor")])
def test_noise(distance: float, grade: str) -> None:
    voice = syllables()
    noisy = voice + noise(len(voice), voice_level(frame_levels(Recording(voice, RATE))) - distance)
    assert grades(noisy)["noise"] == grade
    if distance > 10:
        assert value(noisy, "noise") == pytest.approx(distance, abs=2)


def test_silence() -> None:
    assert grades(np.concatenate([syllables(2), np.zeros(4 * RATE), syllables(1)]))["silence"] == "fair"
    assert grades(np.concatenate([syllables(1), np.zeros(9 * RATE), syllables(1)]))["silence"] == "poor"


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.zeros(1), np.zeros(0), np.ones(3)])
def test_odd_recordings_have_findings_that_are_numbers(samples: np.ndarray) -> None:
    for finding in assess(Recording(samples.astype(np.float32), RATE)):
        assert np.isfinite(finding.value)
    assert grades(np.zeros(RATE))["level"] == "poor"
