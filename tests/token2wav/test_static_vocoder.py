"""The function that is captured on a GPU is tested as it is."""

from __future__ import annotations

import pytest
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.token2wav.static_vocoder import StaticVocoder
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import Vocode, complete
from tests.token2wav.test_session import random_prompt, random_tokens, run


@pytest.fixture
def captured(model: CosyVoiceModel, monkeypatch: pytest.MonkeyPatch) -> tuple[StaticVocoder, list[torch.device]]:
    vocoder, devices = StaticVocoder(model.hift, graphs=False), []
    monkeypatch.setattr(vocoder, "_capture", lambda run, device: devices.append(device) or run)
    return vocoder, devices


def test_streams_sound_as_without(model: CosyVoiceModel, captured: tuple[StaticVocoder, list]) -> None:
    vocoder, devices = captured
    for seed, speed in [(0, 1.0), (1, 1.0), (2, 1.3), (3, 1.0)]:
        prompt, tokens = random_prompt(31, seed), random_tokens(170, seed)
        static, plain = (
            torch.cat(run(token2wav.session(prompt, HopSettings(), stream=True, seed=seed, speed=speed), tokens))
            for token2wav in (Token2Wav(model.flow, vocoder), Token2Wav(model.flow, model.hift))
        )
        assert torch.equal(static, plain)
    assert devices


def test_only_what_comes_again_is_captured(model: CosyVoiceModel, captured: tuple[StaticVocoder, list]) -> None:
    vocoder, devices = captured
    token2wav = Token2Wav(model.flow, vocoder)
    run(token2wav.session(random_prompt(31), HopSettings(), stream=True, seed=1), random_tokens(30))
    assert not devices
    run(token2wav.session(random_prompt(31), HopSettings(), stream=True, seed=2), random_tokens(30))
    assert len(devices) == 1  # the first chunk; the second is the end


@torch.inference_mode()
def test_a_batch_sounds_as_one_after_the_other(model: CosyVoiceModel, captured: tuple[StaticVocoder, list]) -> None:
    vocoder, devices = captured
    mels = [torch.randn(1, 80, 150, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    chunks = [(0, 50), (50, 100), (100, 150)]

    def works(hift: torch.nn.Module) -> list[list[Vocode]]:
        states = [model.hift.init_state(1, "cpu", seed=seed) for seed in (0, 1)]
        return [
            [Vocode(hift, mel[:, :, a:b], state, finalize=b == 150) for mel, state in zip(mels, states, strict=True)]
            for a, b in chunks
        ]

    for _ in range(2):  # the second time from what was captured
        for together, apart in zip(works(vocoder), works(model.hift), strict=True):
            Vocode.run(together)
            for work, alone in zip(together, apart, strict=True):
                Vocode.run([alone])
                torch.testing.assert_close(work.sound, alone.sound, atol=1e-5, rtol=0)
    assert len(devices) == 2


def test_a_whole_utterance_is_the_vocoders_own(model: CosyVoiceModel, captured: tuple[StaticVocoder, list]) -> None:
    vocoder, _ = captured
    static, plain = (complete_whole(Token2Wav(model.flow, hift), random_tokens(60)) for hift in (vocoder, model.hift))
    assert torch.equal(static, plain)


def complete_whole(token2wav: Token2Wav, tokens: list[int]) -> torch.Tensor:
    session = token2wav.session(random_prompt(31), HopSettings(), stream=False, seed=5)
    session.push(tokens)
    session.finish()
    with torch.inference_mode():
        return complete(session.chunk())
