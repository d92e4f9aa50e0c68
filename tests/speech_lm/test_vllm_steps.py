"""The sampler of vLLM's V2 model runner in steps as vLLM makes them, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.speech_lm.test_vllm_slots import CODES, REPOSITORY, SIZE

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "speech_codes": CODES,
    "speech_rows": SIZE,
}
LEAST = {
    "part of a prompt": 30,
    "found in the cache": 20,
    "put off": 10,
    "back with ids": 8,
    "part of the ids that came back": 3,
    "after the end": 5,
    "after scores that are not numbers": 2,
    "aborted": 4,
}
"""How often what has to happen, so that the ids say something."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make setup-vllm"),
]


Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What `vllm_steps` found, by the sampler's form."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "tests.speech_lm.vllm_steps", str(model)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_whatever_vllm_does_the_ids_are_those_of_the_sampler(form: str, found: Found) -> None:
    seen = found[form]["seen"]
    assert found[form]["wrong"] == []
    assert {what: seen[what] for what, least in LEAST.items() if seen[what] < least} == {}
