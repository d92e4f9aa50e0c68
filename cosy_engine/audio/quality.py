"""How good a recording is as a voice prompt: its length, loudness, clipping, noise and silence, each with a grade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cosy_engine.audio.decode import PROMPT_SECONDS, Recording, trim_silence

Aspect = Literal["length", "level", "clipping", "noise", "silence"]
Grade = Literal["good", "fair", "poor"]

_FRAME_SECONDS = 0.02
_FLOOR_DB = -96.0  # 16-bit silence
_PAUSE_DB = 30.0  # below the loudness of the voice
_FULL_SCALE = 0.98
_CLIPPED_RUN = 3  # samples in a row that stay at full scale

_COMFORTABLE_SECONDS = (3.0, 15.0)
_QUIET_DB, _SILENT_DB = -36.0, -50.0
_SOME_CLIPPING, _MUCH_CLIPPING = 1e-4, 5e-3
_CLEAN_DB, _NOISY_DB = 25.0, 8.0
_MANY_PAUSES, _MOSTLY_PAUSES = 0.5, 0.8


@dataclass(frozen=True)
class Finding:
    """One aspect of a recording.

    Attributes:
        value: length in seconds, without silence at both ends; level in dB of full scale; clipping as a share of the
            samples; noise as dB that the voice is above it; silence as a share of the time.
    """

    aspect: Aspect
    grade: Grade
    value: float


def assess(recording: Recording) -> list[Finding]:
    """What is to be said about a recording, in the order of `Aspect`; nothing is said of an empty one."""
    if not len(recording.samples):
        return []
    levels = frame_levels(recording)
    voice = voice_level(levels)
    seconds = len(trim_silence(recording.samples, recording.sample_rate)) / recording.sample_rate
    clipped = clipped_share(recording.samples)
    distance = voice - float(np.percentile(levels, 5))
    pauses = float(np.mean(levels < max(voice - _PAUSE_DB, _FLOOR_DB + 1)))
    return [
        Finding("length", _within(seconds, _COMFORTABLE_SECONDS, PROMPT_SECONDS), seconds),
        Finding("level", _at_least(voice, _QUIET_DB, _SILENT_DB), voice),
        Finding("clipping", _at_least(-clipped, -_SOME_CLIPPING, -_MUCH_CLIPPING), clipped),
        Finding("noise", _at_least(distance, _CLEAN_DB, _NOISY_DB), distance),
        Finding("silence", _at_least(-pauses, -_MANY_PAUSES, -_MOSTLY_PAUSES), pauses),
    ]


def frame_levels(recording: Recording) -> np.ndarray:
    """Loudness `[frames]` in dB of full scale (root mean square) of every 20 ms."""
    size = min(len(recording.samples), max(1, round(_FRAME_SECONDS * recording.sample_rate)))
    frames = recording.samples[: len(recording.samples) // size * size].reshape(-1, size)
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    return 10 * np.log10(np.maximum(power, 10 ** (_FLOOR_DB / 10)))


def voice_level(levels: np.ndarray) -> float:
    """Loudness in dB of the frames that carry the voice: those at most 20 dB below the loud ones."""
    spoken = levels[levels >= np.percentile(levels, 95) - 20]
    return float(10 * np.log10(np.mean(10 ** (spoken / 10))))


def clipped_share(samples: np.ndarray) -> float:
    """Share of the samples `[n]` that stay at full scale for three or more in a row."""
    full = np.concatenate([[False], np.abs(samples) >= _FULL_SCALE, [False]])
    edges = np.flatnonzero(full[1:] != full[:-1])
    runs = edges[1::2] - edges[::2]
    return float(runs[runs >= _CLIPPED_RUN].sum()) / max(1, len(samples))


def _at_least(value: float, good: float, fair: float) -> Grade:
    return "good" if value >= good else "fair" if value >= fair else "poor"


def _within(value: float, good: tuple[float, float], fair: tuple[float, float]) -> Grade:
    return "good" if good[0] <= value <= good[1] else "fair" if fair[0] <= value <= fair[1] else "poor"
