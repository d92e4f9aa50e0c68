"""Samples out: PCM and WAV."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cosy_engine.audio.decode import load_audio
from cosy_engine.audio.encode import pcm16, wav_bytes, write_wav


def test_pcm_is_little_endian_rounded_and_clipped() -> None:
    samples = np.array([0, 1, -1, 2, -2, 0.5, 1e-5], np.float32)
    assert np.frombuffer(pcm16(samples), "<i2").tolist() == [0, 32767, -32767, 32767, -32767, 16384, 0]


def test_wav_reads_back() -> None:
    samples = np.linspace(-1, 1, 1000, dtype=np.float32)
    recording = load_audio(wav_bytes(samples, 24_000))
    assert recording.sample_rate == 24_000
    assert np.abs(recording.samples - samples).max() < 1e-4


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.wav"
    write_wav(path, np.zeros(10, np.float32), 24_000)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_wav(path, np.ones(10, np.float32), 24_000)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["o.wav"]
