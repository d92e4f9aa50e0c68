"""The exported speech LM as a vLLM model. Imported by vLLM's processes only; works with the versions of `vllm_plugin`.

Qwen2 over the merged vocabulary; the output head has the speech rows only.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix


class CosyVoice2ForCausalLM(nn.Module):
    """CosyVoice2's and CosyVoice3's speech LM; its config.json is written by `vllm_export`."""

    hf_to_vllm_mapper = Qwen2ForCausalLM.hf_to_vllm_mapper
    packed_modules_mapping = Qwen2ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen2Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.speech_rows,
            config.hidden_size,
            bias=config.speech_head_bias,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(config.speech_rows)

    @staticmethod
    def get_model_state_cls() -> type:
        """For the V2 model runner, which asks the model how its requests are sampled."""
        from cosy_engine.speech_lm.vllm_state import RasModelState

        return RasModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [n] of the merged vocabulary -> [n, D]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [n, D] of the tokens that are scheduled in this step, whichever sequences they are of."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Scores [n, speech rows]."""
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of model.safetensors; returns the names of the parameters that got one."""
        return AutoWeightsLoader(self).load_weights(weights)
