"""The table of vLLM's V2 model runner, on a CPU: steps as that runner makes them, against `RasSampler`."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosy_engine.speech_lm.sampling import GREEDY, RasSampler, SamplingSettings, uniform_numbers
from cosy_engine.speech_lm.vllm_engine import _make, _sampling_arguments
from cosy_engine.speech_lm.vllm_plugin import RAS_ARGUMENT, ras_argument
from cosy_engine.speech_lm.vllm_slots import RING, Batch, Slots, _agrees, choose
from tests.kernels import HOPPER, compiled, interpreted

REPOSITORY = Path(__file__).parents[2]
CODES, SIZE, LONGEST = 40, 43, 64
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(0.9, 30, 4, 0.5),
    GREEDY,
    SamplingSettings(1.0, 10, 100, 0.02),
    SamplingSettings(top_k=10**9, win_size=1),
]
INTERPRETED = """
import sys
import torch
from cosy_engine.speech_lm import vllm_kernel
from cosy_engine.speech_lm.vllm_slots import Batch
cases = torch.load(sys.argv[1])
for batch, table, codes in cases:
    chosen, sampled = vllm_kernel.choose_in_slots(Batch(*batch), table, codes)
    batch.append((chosen, sampled))
torch.save(cases, sys.argv[1])
"""
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def scores(number: int, ids: list[int]) -> torch.Tensor:
    """Some that depend on all ids before."""
    generator = torch.Generator().manual_seed(hash((number, *ids)) % 2**31)
    return torch.randn(SIZE, generator=generator) * (1 + number % 4)


@dataclass
class Request:
    """One whose last prompt tokens count as recent ids in one case of three."""

    number: int
    settings: SamplingSettings
    most: int
    prompt: list[int]
    recent: list[int]
    output: list[int] = field(default_factory=list)
    computed: int = 0
    slot: int = -1

    @classmethod
    def make(cls, number: int) -> Request:
        fate = random.Random(number)
        recent = [fate.randrange(CODES) for _ in range(number % 3 * 7)]
        prompt = [0] * fate.randint(1, 9) + recent
        return cls(number, SETTINGS[number % len(SETTINGS)], fate.randint(1, 25), prompt, recent)

    @property
    def fewest(self) -> int:
        return self.number % 20

    @property
    def argument(self) -> dict[str, object]:
        return ras_argument(self.settings, self.number, self.recent, self.fewest)[RAS_ARGUMENT]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output

    def expected(self) -> list[int]:
        sampler = RasSampler(self.settings, self.number)
        uniform_numbers(sampler.generator, len(self.recent))
        output: list[int] = []
        for step in range(self.most):
            found = scores(self.number, self.prompt + output)
            if step < self.fewest:
                found[CODES:] = float("-inf")
            output.append(sampler(found.log_softmax(0), self.recent + output))
        return output


class Runner:
    """Steps of any requests, in any order, prompts in pieces; requests are put off and come back."""

    def __init__(self, requests: list[Request], seed: int, slots: int = 5) -> None:
        self.waiting = requests
        self.running: list[Request] = []
        self.fate = random.Random(seed)
        self.slots = Slots(slots, LONGEST, CODES, SIZE, torch.device("cpu"))
        self.free = list(range(slots))
        self.steps: list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run(self) -> None:
        while self.waiting or self.running:
            while self.waiting and self.free:
                self.admit(self.waiting.pop(0))
            self.step()
            if len(self.running) > 1 and self.fate.random() < 0.2:
                self.put_off(self.fate.choice(self.running))

    def admit(self, request: Request) -> None:
        request.slot, request.computed = self.free.pop(), 0
        self.slots.add(request.slot, request.argument, request.most, len(request.prompt), list(request.output))
        self.running.append(request)

    def put_off(self, request: Request) -> None:
        self.running.remove(request)
        self.free.append(request.slot)
        self.waiting.append(request)

    def step(self) -> None:
        self.fate.shuffle(self.running)
        parts, tokens, positions, ids = [], [], [], []
        for request in self.running:
            left = len(request.ids) - request.computed
            parts.append(self.fate.randint(1, left) if self.fate.random() < 0.5 else left)
            until = request.computed + parts[-1]
            positions += range(request.computed, until)
            ids += request.ids[request.computed : until]
            tokens.append(len(ids) - 1)
            request.computed = until
        logits = torch.stack([scores(request.number, request.ids[: request.computed]) for request in self.running])
        slot = torch.tensor([request.slot for request in self.running], dtype=torch.int32)
        batch = Batch(logits, slot, torch.tensor(tokens), torch.tensor(positions), torch.tensor(ids, dtype=torch.int32))
        before = self.slots.table.clone()
        chosen, sampled = self.slots.choose(batch, slot.numpy())
        self.steps.append((list(batch), before, chosen, sampled))
        for request, id_, kept in zip(list(self.running), chosen.tolist(), sampled.tolist(), strict=True):
            assert kept == (request.computed == len(request.ids))
            if kept:
                request.output.append(id_)
            if len(request.output) == request.most:
                self.running.remove(request)
                self.free.append(request.slot)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_else_runs_the_ids_are_those_of_the_sampler(seed: int) -> None:
    requests = [Request.make(number) for number in range(seed * 30, seed * 30 + 30)]
    Runner(list(requests), seed).run()
    assert [request.output for request in requests] == [request.expected() for request in requests]


def test_part_of_the_ids_that_came_back_does_not_touch_the_ring() -> None:
    slots = Slots(1, LONGEST, CODES, SIZE, torch.device("cpu"))
    slots.add(0, ras_argument(SamplingSettings(win_size=4), 0, [], 0)[RAS_ARGUMENT], 30, 10, list(range(12)))
    before, one = slots.table.clone(), torch.tensor([0])
    _, sampled = slots.choose(
        Batch(torch.zeros(1, SIZE), one, one, torch.tensor([13]), torch.tensor([3])), np.array([0])
    )
    assert sampled.tolist() == [0]
    assert torch.equal(slots.table, before)


def test_scores_that_are_not_numbers_and_draws_beyond_the_last_number() -> None:
    slots = Slots(2, LONGEST, CODES, SIZE, torch.device("cpu"))
    slots.add(1, Request.make(4).argument, 3, 2, [])
    logits = torch.zeros(2, SIZE)
    logits[0, 3] = float("nan")
    logits[1, 7] = 1.0
    batch = Batch(logits, torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([30, 0]), torch.tensor([5, 5]))
    chosen, sampled = slots.choose(batch, np.array([1, 0]))
    assert chosen.tolist() == [SIZE, 7] and sampled.tolist() == [1, 1]  # a slot that was never used: the likeliest id


def test_a_step_waits_for_as_long_as_all_in_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    slots = Slots(4, LONGEST, CODES, SIZE, torch.device("cpu"))
    for slot, patience in enumerate((0.004, 0.002, 0.0)):
        slots.add(slot, ras_argument(GREEDY, 0, [], 0, patience)[RAS_ARGUMENT], 3, 2, [])
    for together in ([0], [0], [0, 1], [0, 2], [0], [], [0], [0, 3], [0]):  # number 3 was never used: vLLM warms up
        slots.rest(np.array(together, dtype=np.int64))
    assert slept == [0.004, 0.002, 0.004]  # and as all in the step before, whose ids are sent after the sleep


@pytest.mark.vllm
@needs_triton
def test_the_kernel_chooses_as_the_torch_form_does(tmp_path: Path) -> None:
    runner = Runner([Request.make(number) for number in range(12)], seed=9)
    runner.run()
    steps = runner.steps[::3]
    path = tmp_path / "steps.pt"
    torch.save([(batch, table, CODES) for batch, table, _, _ in steps], path)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(path)]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (batch, _, _), (_, _, chosen, sampled) in zip(torch.load(path), steps, strict=True):
        kept = sampled.bool()
        assert torch.equal(batch[-1][1], sampled)
        assert torch.equal(batch[-1][0][kept], chosen[kept])


@pytest.mark.vllm
@needs_triton
def test_its_own_check_agrees() -> None:
    program = """
import torch
from cosy_engine.speech_lm import vllm_kernel, vllm_slots
print(vllm_slots._agrees(vllm_kernel.choose_in_slots, torch.device("cpu"), 90))
"""
    assert interpreted(program) == ["True"]


@pytest.mark.parametrize("wrong", ["ids", "table", "sampled"])
def test_the_check_notices_another_result(wrong: str) -> None:
    def kernel(batch: Batch, table: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, sampled = choose(batch, table, codes, 10)
        if wrong == "table":
            table[2, RING] += 1
        return ids + (wrong == "ids"), sampled * (wrong != "sampled")

    assert _agrees(lambda *step: choose(*step, 10), torch.device("cpu"), SIZE)
    assert not _agrees(kernel, torch.device("cpu"), SIZE)


@pytest.mark.vllm
@needs_vllm
def test_if_vllm_refuses_its_newer_runner_it_starts_with_the_older(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    started: list[str] = []

    def start(arguments: object, usage_context: object) -> str:
        started.append(os.environ["VLLM_USE_V2_MODEL_RUNNER"])
        if len(started) == 1:
            raise ValueError("Model Runner V2 does not yet support this.")
        return "engine"

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", start)
    made: list[object] = []
    _make({"model": "nothing"}, made)
    assert made == ["engine"]
    assert started == ["0", "0"]  # a CPU has the older one only


@pytest.mark.vllm
@needs_triton
def test_it_compiles_for_gpus() -> None:
    from cosy_engine.speech_lm.vllm_kernel import _WARPS, _choose_in_slots

    types = {"logits": "*bf16", "slots": "*i32", "tokens": "*i64", "positions": "*i64", "token_ids": "*i32"}
    types |= {"table": "*fp64", "out": "*i64", "sampled": "*i32"}
    assert "cubin" in compiled(_choose_in_slots, HOPPER, types=types, constants={"BLOCK": 8192}, num_warps=_WARPS)


@pytest.mark.vllm
@needs_vllm
def test_vllm_gets_the_ids_and_keeps_its_own_sampler() -> None:
    from cosy_engine.speech_lm.vllm_state import RasSampler

    slots = Slots(2, LONGEST, CODES, SIZE, torch.device("cpu"))
    request = Request.make(3)
    slots.add(1, request.argument, request.most, 4, [])
    step = SimpleNamespace(
        idx_mapping=torch.tensor([1, 0]),
        idx_mapping_np=np.array([1, 0]),
        logits_indices=torch.tensor([2, 4]),
        positions=torch.tensor([0, 1, 2, 6, 7]),
        input_ids=torch.zeros(5, dtype=torch.int32),
    )
    sampler = RasSampler(SimpleNamespace(penalties_state="vLLM's"), slots)
    sampler.add_request(1, 4, None)
    sampler.apply_staged_writes()
    output = sampler(torch.eye(SIZE)[:2], step)
    assert output.sampled_token_ids[1].tolist() == [1]
    assert output.num_sampled.tolist() == [0, 1]  # the first one's prompt has a token more
    assert output.num_rejected.tolist() == [0, 0]
    assert sampler.penalties_state == "vLLM's"


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize(
    ("runner", "argument"), [("1", "worker_extension_cls"), ("0", "logits_processors"), (None, "logits_processors")]
)
def test_how_vllm_comes_to_sample_as_we_do(runner: str | None, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner or "")
    if runner is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    assert [*_sampling_arguments()] == [argument]  # without a wish: a CPU has the older one only
