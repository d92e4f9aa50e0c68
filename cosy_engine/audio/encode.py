"""Samples to 16-bit PCM and WAV."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

from cosy_engine.files import write_atomically


def pcm16(samples: np.ndarray) -> bytes:
    """Little-endian 16-bit PCM of float samples `[n]`; what lies outside -1..1 is clipped."""
    return (np.clip(samples, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """A mono 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm16(samples))
    return buffer.getvalue()


def write_wav(path: str | Path, samples: np.ndarray, rate: int) -> None:
    """Write a WAV file; at `path` there is the whole of it or what was there before.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    write_atomically(Path(path), wav_bytes(samples, rate))
