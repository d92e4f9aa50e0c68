"""Bounds that speech keeps, whoever speaks: how long, how loud, how high, how long silent."""

from __future__ import annotations

import numpy as np
import torch

from cosy_engine.audio.resample import resample
from cosy_engine.frontend import estimate_seconds
from recipes.embedded.features import SAMPLE_RATE, pitch

FRAME = 0.02  # seconds
SILENT = 0.01  # of the loudest frame: 40 dB below it
LONGEST_SILENCE = 1.2  # seconds, within or around a sentence
QUIETEST, LOUDEST = 0.01, 0.5  # root mean square
FULL_SCALE = 0.999
LOWEST, HIGHEST = 70, 400  # Hz, median pitch of a voice


def faults(samples: np.ndarray, rate: int, text: str) -> list[str]:
    """What is not as in speech that says `text`; nothing if all is well."""
    found = []
    seconds, expected = len(samples) / rate, estimate_seconds(text)
    if not 0.5 * expected <= seconds <= 2 * expected + 0.5:
        found.append(f"{seconds:.1f} s long, about {expected:.1f} expected")
    if not len(samples):
        return found
    level = float(np.sqrt(np.mean(samples**2)))
    if not QUIETEST <= level <= LOUDEST:
        found.append(f"level {level:.4f}")
    if (clipped := int((np.abs(samples) >= FULL_SCALE).sum())) > 0:
        found.append(f"{clipped} samples clipped")
    if (silence := longest_silence(samples, rate)) > LONGEST_SILENCE:
        found.append(f"{silence:.2f} s of silence")
    height = median_pitch(samples, rate)
    if height is None or not LOWEST <= height <= HIGHEST:
        found.append(f"median pitch {height}")
    return found


def longest_silence(samples: np.ndarray, rate: int) -> float:
    """Seconds."""
    size = int(FRAME * rate)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    level = np.sqrt(np.mean(frames**2, axis=1))
    longest = run = 0
    for silent in level <= SILENT * level.max(initial=0):
        run = run + 1 if silent else 0
        longest = max(longest, run)
    return longest * FRAME


def median_pitch(samples: np.ndarray, rate: int) -> float | None:
    """Hz; None if hardly anything is voiced."""
    track = pitch(torch.from_numpy(resample(samples, rate, SAMPLE_RATE))[None])[0]
    voiced = track[track > 0]
    return float(voiced.median()) if len(voiced) > 0.2 * len(track) else None
