"""The Triton kernel in Triton's interpreter and its compiler, which need no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosy_engine.speech_lm.sampling import RECENT, choose, uniform_numbers
from tests.kernels import HOPPER, compiled

REPOSITORY = Path(__file__).parents[2]
INTERPRETED = """
import sys
import torch
from cosy_engine.speech_lm import vllm_kernel
cases = torch.load(sys.argv[1])
torch.save([vllm_kernel.choose(*case) for case in cases], sys.argv[1])
print(vllm_kernel.agrees(torch.device("cpu"), 60))
"""
Case = tuple[torch.Tensor, torch.Tensor]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make setup-vllm"),
]


def row(uniform: float, top_p: float, top_k: int, too_often: float, excluded: int, recent: list[int]) -> list[float]:
    return [uniform, top_p, top_k, too_often, excluded, *recent]


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(2)
    uniform = uniform_numbers(generator, 5).tolist()
    scores = torch.randn(5, 500, generator=generator) * torch.linspace(0.2, 9.0, 5).unsqueeze(1)
    likely = scores.topk(4).indices.tolist()
    broken = torch.zeros(3, 40)
    broken[0, 7], broken[1, 39] = float("nan"), float("-inf")
    large = torch.randn(1, 6564, generator=generator) * 3
    made = {
        "published size": (large, [row(0.7, 0.8, 25, 1.0, 6564, large[0].topk(10).indices.tolist())]),
        "published settings": (
            scores,
            [row(u, 0.8, 25, 1.0, 500, [*ids, *ids[:2], -1, -1]) for u, ids in zip(uniform, likely, strict=True)],
        ),
        "several settings, no end yet": (
            scores,
            [
                row(uniform[index], [0.3, 1.0, 0.95][index % 3], [450, 3, 40][index % 3], 2.0, 497, likely[index] * 2)
                for index in range(5)
            ],
        ),
        "equal scores, cut by top_k": (torch.zeros(5, 40), [row(u, 0.9, 25, 1.0, 40, [3, 24, 30]) for u in uniform]),
        "equal scores, cut by top_p": (torch.zeros(5, 40), [row(u, 0.31, 99, 1.0, 30, [0, 9, -1]) for u in uniform]),
        "nearly certain and repeated": (
            torch.tensor([30.0, 1.0, 0.5, 0.0]).repeat(5, 1),
            [row(u, 0.8, 25, 1.0, 4, [0]) for u in uniform],
        ),
        "only one possible": (torch.zeros(5, 40), [row(u, 0.8, 25, 1.0, 1, [0, 0]) for u in uniform]),
        "a part of wider rows": (
            torch.randn(5, 64, generator=generator)[:, :40],
            [row(u, 0.8, 25, 1.0, 38, [1, 2]) for u in uniform],
        ),
        "not numbers": (broken, [row(0.5, 0.8, 25, 1.0, 40, [1])] * 3),
    }
    return {name: (logits, torch.tensor(rows, dtype=torch.float64)) for name, (logits, rows) in made.items()}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], str]:
    path = tmp_path_factory.mktemp("kernel") / "cases.pt"
    torch.save(list(cases().values()), path)
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip(cases(), torch.load(path), strict=True)), result.stdout


@pytest.mark.parametrize("name", cases())
def test_the_kernel_chooses_as_the_torch_form_does(name: str, chosen: tuple[dict[str, torch.Tensor], str]) -> None:
    logits, rows = cases()[name]
    assert rows.shape[1] > RECENT
    assert torch.equal(chosen[0][name], choose(logits, rows))


def test_it_compiles_for_gpus() -> None:
    from cosy_engine.speech_lm.vllm_kernel import _WARPS, _choose

    types = {"logits": "*fp32", "rows": "*fp64", "out": "*fp32"}
    assert "cubin" in compiled(_choose, HOPPER, types=types, constants={"BLOCK": 8192}, num_warps=_WARPS)


def test_its_own_check_agrees(chosen: tuple[dict[str, torch.Tensor], str]) -> None:
    assert chosen[1].split() == ["True"]
