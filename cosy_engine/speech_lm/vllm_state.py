"""`vllm_slots` as the sampler of vLLM's V2 model runner. Imported by vLLM's processes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from cosy_engine.speech_lm.vllm_plugin import RAS_ARGUMENT
from cosy_engine.speech_lm.vllm_slots import Batch, Slots


class RasModelState(DefaultModelState):
    """Tells the sampler of the requests that come; their slots are the model runner's."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if vllm_config.speculative_config is not None:
            raise ValueError("This model's sampler draws one id a step: leave speculative_config out.")
        config = self.model_config.hf_config
        self._slots = Slots(self.max_num_reqs, self.max_model_len, config.speech_codes, config.speech_rows, device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params, prompt = new_req_data.sampling_params, len(new_req_data.prompt_token_ids)
        given = (params.extra_args or {}).get(RAS_ARGUMENT)
        self._slots.add(req_index, given, params.max_tokens, prompt, new_req_data.prefill_token_ids[prompt:])

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """In place of vLLM's own."""
        return RasSampler(sampler, self._slots), None


class RasSampler:
    """Has all that vLLM's sampler has, but does nothing for vLLM's own settings of a request."""

    def __init__(self, sampler: Any, slots: Slots) -> None:
        self._sampler = sampler
        self._slots = slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def add_request(self, *_: Any) -> None:
        """Done by `RasModelState`, in the same way for all versions of vLLM."""

    def apply_staged_writes(self) -> None:
        """Nothing waits to be written."""

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        batch = Batch(
            logits, input_batch.idx_mapping, input_batch.logits_indices, input_batch.positions, input_batch.input_ids
        )
        ids, sampled = self._slots.choose(batch, input_batch.idx_mapping_np)
        self._slots.rest(input_batch.idx_mapping_np)
        return SamplerOutput(
            sampled_token_ids=ids.view(-1, 1),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=sampled,
            num_rejected=torch.zeros_like(sampled),
        )
