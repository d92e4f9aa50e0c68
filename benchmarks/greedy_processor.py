"""For `benchmarks.speech_lm`: the logits processor without its work, to see what that costs. Imported by vLLM only."""

from __future__ import annotations

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate

from cosy_engine.speech_lm.vllm_ras import RasLogitsProcessor


class GreedyProcessor(RasLogitsProcessor):
    """The likeliest speech code."""

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        logits[:, self._codes :] = float("-inf")
        return logits
