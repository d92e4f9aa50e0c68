"""For `benchmarks.speech_lm`: makes the model known to a vLLM without our logits processor. Imported by vLLM only."""

from __future__ import annotations

from cosy_engine.speech_lm.vllm_plugin import register

register()


class PlainWorker:
    """Adds nothing to vLLM's worker, which imports it before it loads the model."""
