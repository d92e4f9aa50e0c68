"""Recording to speech tokens, the codes that the speech LM continues."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosy_engine.audio.features import WHISPER_RATE, whisper_log_mel
from cosy_engine.audio.onnx_session import OnnxModel

_LONGEST = 30 * WHISPER_RATE  # samples; the network has not seen more at a time


class SpeechTokenizer:
    """The ONNX speech tokenizer: `(log-mel [1, 128, T], length int32 [1]) -> codes`, 25 a second."""

    def __init__(self, onnx_path: Path, device: torch.device) -> None:
        self._model = OnnxModel(onnx_path, device)

    def __call__(self, samples_16k: np.ndarray) -> Tensor:
        """Codes int32 [m] of float32 samples [n] at 16 kHz; more than 30 s are read in equal parts."""
        count = math.ceil(len(samples_16k) / _LONGEST)
        return torch.cat([self._tokens(part) for part in np.array_split(samples_16k, count)])

    def _tokens(self, samples_16k: np.ndarray) -> Tensor:
        features = whisper_log_mel(torch.from_numpy(samples_16k)[None]).numpy()
        codes = self._model(features, np.array([features.shape[2]], np.int32))
        return torch.from_numpy(codes.reshape(-1).astype(np.int32))
