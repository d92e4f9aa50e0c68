"""The exported estimator run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor


class OnnxEstimator:
    """Takes and gives tensors by name, as `TensorRTEngine` does.

    Args:
        most_frames: more do not fit.
    """

    def __init__(self, path: Path, most_frames: int = 10_000) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._most_frames = most_frames
        self.calls = 0

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        return inputs["x"].shape[2] <= self._most_frames

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        names = [output.name for output in self._session.get_outputs()]
        outputs = self._session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}
