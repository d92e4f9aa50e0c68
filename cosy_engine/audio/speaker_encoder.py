"""Recording to the 192 numbers that describe the speaker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosy_engine.audio.features import kaldi_fbank
from cosy_engine.audio.onnx_session import OnnxModel


class SpeakerEncoder:
    """The ONNX speaker encoder (CAM++): `filter bank minus its mean over time [1, T, 80] -> [1, 192]`."""

    def __init__(self, onnx_path: Path, device: torch.device) -> None:
        self._model = OnnxModel(onnx_path, device)

    def __call__(self, samples_16k: np.ndarray) -> Tensor:
        """Embedding float32 [192] of float32 samples [n] at 16 kHz."""
        features = kaldi_fbank(torch.from_numpy(samples_16k)[None])
        features = features - features.mean(dim=0, keepdim=True)
        return torch.from_numpy(self._model(features[None].numpy()).reshape(-1).astype(np.float32))
