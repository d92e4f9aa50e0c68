from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cosy_engine.checkpoint.load import load_model
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from cosy_engine.text.tokenizer import TextTokenizer
from tests.standin import SPEECH_CODES, write_standin

LAYOUTS = ["cosyvoice2", "cosyvoice3"]


@pytest.fixture(params=LAYOUTS)
def standin(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"standin_v{request.param[-1]}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_seed_decides_the_weights(tmp_path: Path, layout: str) -> None:
    states = [
        torch.load(write_standin(tmp_path / name, layout, seed) / "flow.pt", weights_only=True)[
            "input_embedding.weight"
        ]
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_writing_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    write_standin(tmp_path / "model", "cosyvoice2")
    assert torch.equal(torch.rand(2), expected)


def test_it_is_small(standin: Path) -> None:
    assert sum(path.stat().st_size for path in standin.rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize("frames", [1, 4, 5, 101, 3000])
def test_speech_tokenizer(standin: Path, frames: int) -> None:
    session = onnxruntime.InferenceSession(next(standin.glob("speech_tokenizer_v*.onnx")))
    features, length = (node.name for node in session.get_inputs())
    log_mel = np.random.default_rng(0).normal(size=(1, 128, frames)).astype(np.float32)
    feeds = {features: log_mel, length: np.array([frames], np.int32)}
    (codes,) = session.run(None, feeds)
    assert codes.dtype == np.int32 and codes.shape == (1, -(-frames // 4))
    assert codes.min() >= 0 and codes.max() < SPEECH_CODES
    np.testing.assert_array_equal(session.run(None, feeds)[0], codes)
    if frames > 100:
        assert len(np.unique(codes)) > 0.8 * codes.size


def test_speaker_encoder(standin: Path) -> None:
    session = onnxruntime.InferenceSession(standin / "campplus.onnx")
    numbers = np.random.default_rng(0)
    features = [numbers.normal(size=(1, frames, 80)).astype(np.float32) for frames in (50, 300)]
    one, other = (session.run(None, {session.get_inputs()[0].name: feature})[0] for feature in features)
    assert one.shape == other.shape == (1, 192)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("text", ["希望你以后能够做的比我还好呦。", "Hello, world!", "😀\x07 ﷽ नमस्ते", "naïve\n\tcafé"])
def test_any_text_has_tokens(standin: Path, text: str) -> None:
    model = load_model(standin)
    tokenizer = TextTokenizer(model.tokenizer_dir, model.name)
    ids = tokenizer.encode(text)
    rows = model.lm.llm.model.model.embed_tokens.num_embeddings
    assert ids and max(ids) < rows
    assert len(tokenizer) <= rows


def test_common_chinese_characters_are_one_token_each(standin_v2: Path) -> None:
    tokenizer = TextTokenizer(standin_v2 / "CosyVoice-BlankEN", "cosyvoice2")
    assert len(tokenizer.encode("希望你以后能够做的比我还好，")) == 14


def test_special_tokens_follow_the_vocabulary(standin_v3: Path) -> None:
    tokenizer = TextTokenizer(standin_v3 / "CosyVoice-BlankEN", "cosyvoice3")
    ids = tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|endofprompt|>[breath]")
    assert ids == list(range(ids[0], ids[0] + 5))
    assert len(tokenizer.encode("a[AA1]b")) == 3


def test_speech_ends_by_itself_or_at_the_limit(standin: Path) -> None:
    lm = TorchSpeechLM(load_model(standin).lm)

    async def lengths(max_ratio: float) -> list[int]:
        requests = [SpeechLMRequest([300, 301, 302], seed=seed, max_ratio=max_ratio) for seed in range(12)]
        return sorted([len([code async for code in lm.generate(request)]) for request in requests])

    try:
        limited, free = asyncio.run(lengths(3.0)), asyncio.run(lengths(20.0))
    finally:
        lm.close()
    assert limited[0] >= 6 and limited[-1] == 9
    assert free[6] < 60, "the end does not come by itself"
    assert len(set(free)) > 3
