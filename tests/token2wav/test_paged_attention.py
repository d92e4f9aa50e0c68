"""The Triton kernel in Triton's interpreter and its compiler, which need no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.kernels import AMPERE, HOPPER, compiled, interpreted

AGREES = """
import sys, torch
from cosy_engine.token2wav import paged_attention
print(paged_attention.agrees(torch.device("cpu"), getattr(torch, sys.argv[1]), 2, 16))
"""
ESTIMATORS = """
import torch
from cosy_engine.modules.attention import PagedPast
from cosy_engine.modules.flow_matching import EstimatorInputs
from cosy_engine.token2wav.paged_attention import KernelPast
from cosy_engine.token2wav.static_estimator import StaticEstimator
from tests.modules.small_flow import small_estimator

for version in ("cosyvoice2", "cosyvoice3"):
    torch.manual_seed(1)
    plain = small_estimator(version)
    chunks = []
    for frames in ([44, 31], [100, 20], [50, 50]):  # of two streams, the second of which begins later
        chunks.append([torch.randn(3, 2, 80, count) for count in frames])
    results = []
    for past in (PagedPast, KernelPast):
        static = StaticEstimator(plain, steps=2, memory=2**24, graphs=False, past=past)
        states = [{"stream": static.new_stream(2), "step": 1} for _ in range(2)]
        given = torch.ones(2, 80), plain.time_features(torch.tensor([0.3])).expand(2, -1)
        with torch.inference_mode():
            for number, chunk in enumerate(chunks):
                for (x, *_), state in zip(chunk, states):
                    state["stream"].reserve(x.shape[2])
                batch = [
                    EstimatorInputs(x, None, mu, given[1], given[0], cond, state)
                    for (x, mu, cond), state in zip(chunk, states)
                ]
                velocities = static.velocities(batch if number else batch[:1])
        results.append([*velocities, *(state["stream"].tails[1] for state in states)])
    print(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results)))
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make setup-vllm"),
]


@pytest.mark.parametrize(("capability", "dtype"), [(AMPERE, "fp16"), (HOPPER, "bf16"), (HOPPER, "fp32")])
@pytest.mark.parametrize("split", [False, True])
def test_it_compiles_for_gpus(capability: int, dtype: str, split: bool) -> None:
    from cosy_engine.token2wav.paged_attention import _attend, _join, tiles_for

    types = dict.fromkeys(("query", "key", "value", "pages", "out"), f"*{dtype}")
    types |= dict.fromkeys(("part", "best_part", "total_part"), "*fp32")
    types |= {"table": "*i32", "steps": "*i32", "lengths": "*i64", "counts": "*i64", "scale": "fp32"}
    tiles = tiles_for(torch.float32 if dtype == "fp32" else torch.float16, 1, 1, 0, 1)
    constants = {"D": 64, "PAGE": 16, "QUERIES": tiles.queries, "KEYS": tiles.keys, "SPLIT": split}
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    assert "cubin" in compiled(_attend, capability, types=types, constants=constants, **options)
    assert "cubin" in compiled(_join, capability, types=types, constants={"D": 64, "QUERIES": 16})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_its_own_check_agrees(dtype: str) -> None:
    assert interpreted(AGREES, dtype) == ["True"]


def test_the_check_notices_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosy_engine.modules.attention import PagedPast
    from cosy_engine.token2wav import paged_attention

    def wrong(self: PagedPast, *tensors: torch.Tensor, tiles: object = None) -> torch.Tensor:
        return PagedPast.attend(self, *tensors[:3], mask=None)

    monkeypatch.setattr(paged_attention.KernelPast, "attend", wrong)
    assert not paged_attention.agrees(torch.device("cpu"), torch.float32, 2, 16)


def test_an_estimator_gives_the_same() -> None:
    assert interpreted(ESTIMATORS) == ["True"] * 2
