"""The bounds of tests/sound.py: real speech keeps them, what went wrong does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cosy_engine.audio.decode import load_audio
from tests.recordings import hum
from tests.sound import faults, longest_silence, median_pitch

PROMPTS = sorted((Path(__file__).parents[1] / "assets" / "prompts").glob("*.wav"))
RATE = 24000


def speech() -> tuple[np.ndarray, str]:
    return load_audio(PROMPTS[0]).samples, PROMPTS[0].with_suffix(".txt").read_text("utf-8").strip()


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_speech_has_no_faults(path: Path) -> None:
    sound = load_audio(path)
    assert faults(sound.samples, sound.sample_rate, path.with_suffix(".txt").read_text("utf-8").strip()) == []


def test_what_went_wrong_is_found() -> None:
    samples, text = speech()
    noise = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
    wrong = {
        "expected": np.tile(samples, 4),
        "0.0 s long": np.zeros(0, np.float32),
        "level 0.0000": np.zeros_like(samples),
        "clipped": np.clip(samples * 5, -1, 1),
        "of silence": np.concatenate([samples, np.zeros(2 * RATE, np.float32)]),
        "median pitch None": 0.1 * noise,
        "median pitch 4": hum(5, RATE, pitch=450.0),
    }
    for fault, sound in wrong.items():
        assert any(fault in found for found in faults(sound, RATE, text)), fault


def test_pitch_and_silence_are_measured() -> None:
    assert median_pitch(hum(2, RATE, pitch=180.0), RATE) == pytest.approx(180, rel=0.01)
    assert longest_silence(np.concatenate([hum(1, RATE), np.zeros(RATE // 2), hum(1, RATE)]), RATE) == pytest.approx(
        0.5, abs=0.03
    )
