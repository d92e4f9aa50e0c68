"""vLLM's workers import this by name before they load the model: from a source tree there is no entry point."""

from __future__ import annotations

from cosy_engine.speech_lm.vllm_plugin import register

register()


class Worker:
    """Adds nothing to vLLM's worker."""
