"""Steps of vLLM's V2 model runner without its GPU: `python -m tests.speech_lm.vllm_steps MODEL`.

vLLM's own scheduler, with two steps in flight, decides what each step is about; vLLM's own kernels make its batch and
keep its ids; the sampler is `vllm_state`'s. In place of a model come scores that depend on all ids that it was given,
so that one wrong id changes all after it. Requests arrive and are aborted by chance, and there are too few blocks of
cache for them, so that some are put off and come back.

Prints one line of JSON: with the sampler's Triton kernel and with its torch form, which requests got other ids than
`sampling.RasSampler` draws, and how often what happened. Needs a process of its own, with
TRITON_INTERPRET=1. MODEL is a directory with the configuration of any small model, with `speech_codes` and
`speech_rows` in it.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import triton
import vllm.triton_utils
from torch import Tensor
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from cosy_engine.config import SamplingSettings
from cosy_engine.speech_lm import vllm_kernel
from cosy_engine.speech_lm.sampling import RasSampler, uniform_numbers
from cosy_engine.speech_lm.vllm_plugin import ras_argument
from tests.speech_lm.test_vllm_slots import CODES, SETTINGS, SIZE

with patch.multiple(vllm.triton_utils, triton=triton, tl=triton.language):  # on a CPU, vLLM does without Triton
    from vllm.v1.worker.gpu import input_batch as kernels

    from cosy_engine.speech_lm.vllm_state import RasModelState

PROMPT_IDS = range(SIZE + 1, SIZE + 4)
MOST_REQUESTS, LONGEST, TOKENS_PER_STEP = 5, 160, 8
PADDING = 3  # tokens after a step's own, as for CUDA graphs
BLOCKS, BLOCK_SIZE = 24, 4  # of the cache: one of the longest requests fits, not two
CPU = torch.device("cpu")


def scores(number: int, ids: list[int]) -> Tensor:
    """A request's [SIZE] after these ids. Few ids are likely, so they repeat; now and then none is a number."""
    if number % 4 == 3 and len(ids) % 29 == 28:
        return torch.full((SIZE,), float("nan"))
    after = int.from_bytes(hashlib.sha256(repr((number, ids)).encode()).digest()[:4], "little")
    own, changing = (torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (number, after))
    return (2 * own + changing) * (1 + number % 4) / 2


@dataclass
class Request:
    """In two cases of three, the last tokens of its prompt count as recent ids."""

    number: int
    prompt: list[int]
    recent: list[int]
    most: int
    output: list[int] = field(default_factory=list)
    ended: bool = False
    aborted: bool = False

    @classmethod
    def make(cls, number: int, fate: random.Random) -> Request:
        recent = [fate.randrange(CODES) for _ in range(number % 3 * 7)]
        prompt = [fate.choice(PROMPT_IDS)] * fate.randint(1, 25) + recent
        return cls(number, prompt, recent, fate.randint(1, 50))

    @property
    def settings(self) -> SamplingSettings:
        return SETTINGS[self.number % len(SETTINGS)]

    @property
    def fewest(self) -> int:
        return self.number % 30

    def for_vllm(self) -> VllmRequest:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=self.most,
            stop_token_ids=[*range(CODES, SIZE + 1)],
            ignore_eos=True,
            detokenize=False,
            extra_args=ras_argument(self.settings, self.number, self.recent, self.fewest),
        )
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        return VllmRequest(str(self.number), list(self.prompt), sampling, None, block_hasher=hasher)

    def is_right(self) -> bool:
        expected = self.expected()
        return self.output == (expected[: len(self.output)] if self.aborted else expected)

    def expected(self) -> list[int]:
        sampler = RasSampler(self.settings, self.number)
        uniform_numbers(sampler.generator, len(self.recent))
        output: list[int] = []
        while len(output) < self.most and (not output or output[-1] < CODES):
            found = scores(self.number, self.prompt + output)
            if len(output) < self.fewest:
                found[CODES:] = float("-inf")
            broken = bool(found.isnan().any())
            output.append(SIZE if broken else sampler(found.log_softmax(0), self.recent + output))
        return output


class Runner:
    """What vLLM's `GPUModelRunner` does with ids; what has a name there has the same one here."""

    def __init__(self, config: VllmConfig, form: str) -> None:
        self.model_state = RasModelState(config, None, None, CPU)
        if form == "kernel":
            self.model_state._slots._kernel = vllm_kernel.choose_in_slots
        self.sampler, _ = self.model_state.custom_sampler(None)
        self.buffers = kernels.InputBuffers(MOST_REQUESTS, TOKENS_PER_STEP + PADDING, CPU)
        self.slots: dict[str, int] = {}
        self.free = list(range(MOST_REQUESTS))
        self.prefill_len, self.num_computed_tokens, self.total_len = torch.zeros(3, MOST_REQUESTS, dtype=torch.int32)
        self.all_token_ids = torch.zeros(MOST_REQUESTS, LONGEST, dtype=torch.int32)
        self.next_prefill_tokens = torch.zeros(1, MOST_REQUESTS, dtype=torch.int32)
        self.last_sampled_tokens = torch.zeros(MOST_REQUESTS, 1, dtype=torch.int64)
        self.draft_tokens = torch.zeros(MOST_REQUESTS, 0, dtype=torch.int64)
        self.given: dict[str, list[int]] = {}  # to the model: what its cache would hold
        self.prompt_len: dict[str, int] = {}
        self.seen: Counter[str] = Counter()

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.remove_requests(step)
        self.add_requests(step)
        if not step.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.seen["steps"] += 1
        names = sorted(step.num_scheduled_tokens, key=step.num_scheduled_tokens.__getitem__)
        slot = np.array([self.slots[name] for name in names])
        starts = np.cumsum([0, *(step.num_scheduled_tokens[name] for name in names)], dtype=np.int32)
        idx_mapping, query_start_loc = torch.tensor(slot), torch.tensor(starts)
        cu_num_logits = torch.arange(len(names) + 1, dtype=torch.int32)
        logits_indices = self.prepare_inputs(idx_mapping, query_start_loc, cu_num_logits)
        padded = step.total_num_scheduled_tokens + PADDING
        batch = SimpleNamespace(
            idx_mapping=idx_mapping,
            idx_mapping_np=slot,
            logits_indices=logits_indices,
            positions=self.buffers.positions[:padded],
            input_ids=self.buffers.input_ids[:padded],
        )
        output = self.sampler(self.model(names, starts.tolist()), batch)
        num_sampled, num_rejected = kernels.get_num_sampled_and_rejected(
            torch.ones_like(output.num_sampled), self.buffers.seq_lens, cu_num_logits, idx_mapping, self.prefill_len
        )
        assert torch.equal(output.num_sampled, num_sampled)
        assert torch.equal(output.num_rejected, num_rejected)
        kernels.post_update(
            idx_mapping,
            self.num_computed_tokens,
            self.last_sampled_tokens,
            None,
            output.sampled_token_ids,
            output.num_sampled,
            output.num_rejected,
            query_start_loc,
            self.all_token_ids,
            self.total_len,
        )
        drawn = zip(output.sampled_token_ids.tolist(), output.num_sampled.tolist(), strict=True)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: row for row, name in enumerate(names)},
            sampled_token_ids=[ids[:count] for ids, count in drawn],
        )

    def remove_requests(self, step: SchedulerOutput) -> None:
        put_off = step.preempted_req_ids or set()
        self.seen["put off"] += len(put_off)
        for name in sorted(step.finished_req_ids | put_off):
            if name in self.slots:
                self.free.append(self.slots.pop(name))

    def add_requests(self, step: SchedulerOutput) -> None:
        for new in step.scheduled_new_reqs:
            slot, ids, computed = self.free.pop(), new.prefill_token_ids, new.num_computed_tokens
            self.slots[new.req_id] = slot
            self.prefill_len[slot] = self.total_len[slot] = len(ids)
            self.num_computed_tokens[slot] = computed
            self.all_token_ids[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.given[new.req_id] = ids[:computed]
            self.prompt_len[new.req_id] = len(new.prompt_token_ids)
            self.model_state.add_request(slot, new)
            self.seen["found in the cache"] += computed > 0
            self.seen["back with ids"] += len(ids) > len(new.prompt_token_ids)

    def prepare_inputs(self, idx_mapping: Tensor, query_start_loc: Tensor, cu_num_logits: Tensor) -> Tensor:
        """Fill the buffers; returns the place of each request's last token."""
        buffers, computed = self.buffers, self.num_computed_tokens
        kernels.prepare_prefill_inputs(
            buffers.input_ids,
            self.next_prefill_tokens,
            idx_mapping,
            query_start_loc,
            self.all_token_ids,
            self.prefill_len,
            computed,
        )
        kernels.prepare_pos_seq_lens(idx_mapping, query_start_loc, computed, buffers.positions, buffers.seq_lens)
        return kernels.combine_sampled_and_draft_tokens(
            buffers.input_ids,
            idx_mapping,
            self.last_sampled_tokens,
            query_start_loc,
            buffers.seq_lens,
            self.prefill_len,
            self.draft_tokens,
            cu_num_logits,
            len(idx_mapping),
        )

    def model(self, names: list[str], starts: list[int]) -> Tensor:
        """Scores after all that each request's tokens are; a part of wider rows, as those of a padded head are."""
        padded = torch.full((len(names), 64), 9e9)
        for row, name in enumerate(names):
            tokens, given = slice(*starts[row : row + 2]), self.given[name]
            positions = self.buffers.positions[tokens].tolist()
            assert positions == [*range(len(given), len(given) + len(positions))]
            given += self.buffers.input_ids[tokens].tolist()
            padded[row, :SIZE] = scores(int(name), given)
            prompt, complete = self.prompt_len[name], int(self.prefill_len[self.slots[name]])
            self.seen["part of a prompt"] += len(given) < prompt
            self.seen["part of the ids that came back"] += prompt < len(given) < complete
            self.seen["after the end"] += given[-1] in range(CODES, SIZE)
            self.seen["after scores that are not numbers"] += given[-1] == SIZE
        return padded[:, :SIZE]


def settings_of_vllm(model: str) -> VllmConfig:
    return VllmConfig(
        model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=LONGEST),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=MOST_REQUESTS,
            max_num_batched_tokens=TOKENS_PER_STEP,
            max_model_len=LONGEST,
            enable_chunked_prefill=True,
            async_scheduling=True,
            is_encoder_decoder=False,
        ),
        parallel_config=ParallelConfig(),
    )


def scheduler_of_vllm(config: VllmConfig) -> AsyncScheduler:
    config.cache_config.num_gpu_blocks = BLOCKS
    init_none_hash(sha256)
    layer = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)])
    scheduler = AsyncScheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
    )
    scheduler.use_v2_model_runner = True  # on a CPU, the configuration refuses it
    return scheduler


def drive(scheduler: AsyncScheduler, runner: Runner, requests: list[Request], fate: random.Random) -> None:
    """As `step_with_batch_queue` of vLLM's `EngineCore`."""
    waiting, in_flight = deque(requests), deque()
    came: dict[str, Request] = {}
    while waiting or in_flight or scheduler.has_requests():
        for _ in range(min(fate.randint(0, 2), len(waiting))):
            request = waiting.popleft()
            came[str(request.number)] = request
            scheduler.add_request(request.for_vllm())
        if scheduler.has_requests():
            step = scheduler.schedule()
            in_flight.append((step, runner.run(step)))
            if len(in_flight) < 2 and (step.total_num_scheduled_tokens or scheduler.has_requests()):
                continue
        if in_flight:
            for outputs in scheduler.update_from_output(*in_flight.popleft()).values():
                for output in outputs.outputs:
                    came[output.request_id].output += output.new_token_ids
                    came[output.request_id].ended |= output.finish_reason is not None
        live = [request for request in came.values() if not request.ended and not request.aborted]
        if live and fate.random() < 0.02:
            request = fate.choice(live)
            request.aborted = True
            scheduler.finish_requests([str(request.number)], RequestStatus.FINISHED_ABORTED)


def found(config: VllmConfig, form: str) -> dict[str, object]:
    fate = random.Random(13)
    requests = [Request.make(number, fate) for number in range(30)]
    runner = Runner(config, form)
    drive(scheduler_of_vllm(config), runner, requests, fate)
    runner.seen["aborted"] = sum(request.aborted for request in requests)
    return {"wrong": [request.number for request in requests if not request.is_right()], "seen": runner.seen}


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = settings_of_vllm(sys.argv[1])
    print(json.dumps({form: found(config, form) for form in ("kernel", "torch")}))
