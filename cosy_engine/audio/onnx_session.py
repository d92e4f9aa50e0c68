"""ONNX models of a model directory, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from cosy_engine.errors import ModelDirectoryError


class OnnxModel:
    """A model of one output whose inputs are given by position, whatever their names.

    Raises:
        ModelDirectoryError: the file is missing or no model.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise ModelDirectoryError(f"The model directory is incomplete: {path} is missing.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # only what is fatal; failures arrive as exceptions
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelDirectoryError(f"{path} is not an ONNX model that can be run: {error}") from error
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, *values: np.ndarray) -> np.ndarray:
        return self._session.run(None, dict(zip(self._inputs, values, strict=True)))[0]
