"""Voices: prompts with everything precomputed that does not depend on the text, and the folder they live in."""

from cosy_engine.voices.store import VoiceStore
from cosy_engine.voices.voice import Voice, VoiceInfo

__all__ = ["Voice", "VoiceInfo", "VoiceStore"]
