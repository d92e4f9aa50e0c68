"""Streaming text-to-speech engine for CosyVoice2 and Fun-CosyVoice3 checkpoints."""

__version__ = "0.1.0"
