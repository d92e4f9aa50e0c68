"""For `benchmarks.speech_lm`: makes the model known to a vLLM without our sampling. Imported by vLLM only."""

from __future__ import annotations

from cosy_engine.speech_lm.vllm_model import CosyVoice2ForCausalLM
from cosy_engine.speech_lm.vllm_plugin import register

register()
del CosyVoice2ForCausalLM.get_model_state_cls


class PlainWorker:
    """Adds nothing to vLLM's worker, which imports it before it loads the model."""
