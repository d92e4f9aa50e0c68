"""Streaming text-to-speech engine for CosyVoice2 and Fun-CosyVoice3 checkpoints."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when onnxruntime is imported
