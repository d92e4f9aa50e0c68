"""Streaming text-to-speech engine for CosyVoice2 and Fun-CosyVoice3 checkpoints."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when onnxruntime is imported

# Also read once. oneDNN, which computes convolutions on a CPU, compiles code for each shape and by default keeps it for
# 1024. The chunks of a few streams have more, so nearly each would be compiled anew; 4096 take up to 0.3 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
