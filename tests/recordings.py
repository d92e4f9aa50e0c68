"""Recordings for tests: made up, but with the length, the rhythm and the loudness of speech."""

from __future__ import annotations

import io

import numpy as np
import soundfile


def hum(seconds: float, rate: int = 16000, channels: int = 1, pitch: float = 150.0) -> np.ndarray:
    """float32 [n] or [n, channels]: a buzzing tone that swells four times a second."""
    moment = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch * harmonic * moment) / harmonic for harmonic in range(1, 12))
    wave = (0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * moment))).astype(np.float32)
    return wave if channels == 1 else np.stack([wave * (1 - 0.1 * number) for number in range(channels)], axis=1)


def encoded(samples: np.ndarray, rate: int = 16000, kind: str = "WAV") -> bytes:
    """The samples as a file of the kind, as soundfile names it: WAV, FLAC, OGG, MP3."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()
