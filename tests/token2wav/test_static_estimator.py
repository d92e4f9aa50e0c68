"""The static shapes are tested without capturing them: on a GPU the same function is captured as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.attention import PagedPast
from cosy_engine.token2wav import static_estimator
from cosy_engine.token2wav.static_estimator import StaticEstimator
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import EulerSteps, complete
from tests.token2wav.test_session import random_prompt, random_tokens, run

MEL_TOLERANCE = 1e-4
SOUND_TOLERANCE = 1e-3
STEPS, MEMORY = 10, 2**28


@pytest.fixture
def static(model: CosyVoiceModel) -> Iterator[StaticEstimator]:
    """The model's estimator at static shapes, for one test."""
    decoder = model.flow.decoder
    plain = decoder.estimator
    decoder.estimator = StaticEstimator(plain, steps=STEPS, memory=MEMORY, graphs=False)
    yield decoder.estimator
    decoder.estimator = plain


@pytest.mark.parametrize("prompt_tokens", [0, 31, 77, 260])
@pytest.mark.parametrize("hops", [HopSettings(), HopSettings(token_hop_len_first=7)], ids=["default", "first7"])
def test_a_stream_sounds_as_without(
    model: CosyVoiceModel, static: StaticEstimator, hops: HopSettings, prompt_tokens: int
) -> None:
    prompt, tokens = random_prompt(prompt_tokens), random_tokens(193)
    sound = torch.cat(run(Token2Wav(model.flow, model.hift).session(prompt, hops, stream=True, seed=7), tokens))
    model.flow.decoder.estimator = static.estimator
    plain = torch.cat(run(Token2Wav(model.flow, model.hift).session(prompt, hops, stream=True, seed=7), tokens))
    torch.testing.assert_close(sound, plain, atol=SOUND_TOLERANCE, rtol=0)


def test_a_whole_utterance_is_the_estimators_own(model: CosyVoiceModel, static: StaticEstimator) -> None:
    prompt, tokens = random_prompt(31), random_tokens(60)
    (sound,) = run(Token2Wav(model.flow, model.hift).session(prompt, HopSettings(), stream=False, seed=7), tokens)
    model.flow.decoder.estimator = static.estimator
    (plain,) = run(Token2Wav(model.flow, model.hift).session(prompt, HopSettings(), stream=False, seed=7), tokens)
    assert torch.equal(sound, plain)


@torch.inference_mode()
def test_streams_of_other_pasts_steps_and_lengths_share_a_batch(model: CosyVoiceModel, static: StaticEstimator) -> None:
    def begun(seed: int, prompt_tokens: int, count: int) -> EulerSteps:
        session = Token2Wav(model.flow, model.hift).session(
            random_prompt(prompt_tokens, seed), HopSettings(), stream=True, seed=seed
        )
        session.push(random_tokens(count, seed))
        session.finish()
        complete(session.prepare())
        making = session.chunk()
        encode = next(making)
        encode.run([encode])
        return next(making)

    shapes = [(0, 31, 9), (1, 77, 50), (2, 40, 17)]
    together = [begun(*shape) for shape in shapes]
    EulerSteps.run(together[:1])  # one is a step ahead
    while not all(work.done for work in together):
        EulerSteps.run([work for work in together if not work.done])
    model.flow.decoder.estimator = static.estimator
    for work, shape in zip(together, shapes, strict=True):
        alone = begun(*shape)
        while not alone.done:
            EulerSteps.run([alone])
        torch.testing.assert_close(work.trajectory.x, alone.trajectory.x, atol=MEL_TOLERANCE, rtol=0)


class OnePast(PagedPast):
    """As the kernel's: pages are read where they lie, so the past has one size."""


@torch.inference_mode()
def test_warming_up_captures_what_a_short_request_needs(
    model: CosyVoiceModel, static: StaticEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    static.warm_up(1)
    captured: list[torch.device] = []
    monkeypatch.setattr(static, "_capture", lambda run, device: captured.append(device) or run)
    session = Token2Wav(model.flow, model.hift).session(random_prompt(31), HopSettings(), stream=True, seed=7)
    run(session, random_tokens(60))
    assert captured == []


def test_few_shapes_serve_a_stream(model: CosyVoiceModel, static: StaticEstimator, monkeypatch) -> None:
    """As many graphs are captured; each costs time and memory."""
    captured: list[torch.device] = []
    monkeypatch.setattr(static, "_capture", lambda run, device: captured.append(device) or run)
    token2wav = Token2Wav(model.flow, model.hift)
    for seed, (prompt, count) in enumerate([(31, 120), (77, 75), (60, 31)]):
        run(token2wav.session(random_prompt(prompt, seed), HopSettings(), stream=True, seed=7), random_tokens(count))
    assert 2 <= len(captured) <= 4


@torch.inference_mode()
def test_with_a_kernel_for_it_a_past_has_one_size(model: CosyVoiceModel, static: StaticEstimator) -> None:
    model.flow.decoder.estimator = StaticEstimator(
        static.estimator, steps=STEPS, memory=MEMORY, graphs=False, past=OnePast
    )
    model.flow.decoder.estimator.warm_up(2)
    shapes = set(model.flow.decoder.estimator._steps)
    assert shapes == {(streams, frames, 15000) for streams in (1, 2) for frames in (50, 100, 150, 200, 400)}
    session = Token2Wav(model.flow, model.hift).session(random_prompt(260), HopSettings(), stream=True, seed=7)
    run(session, random_tokens(193))
    assert set(model.flow.decoder.estimator._steps) == shapes


def test_what_is_captured_before_its_first_input_is_finite(model: CosyVoiceModel, static: StaticEstimator) -> None:
    """What a captured run leaves in the shared buffer stays there, and a mask does not hide what is not a number."""
    results: list[torch.Tensor] = []
    static._capture = lambda run, device: results.extend(run()) or run
    with torch.inference_mode():
        static.warm_up(2)
    assert len(results) >= 8 and all(result.isfinite().all() for result in results)
    assert static.pool.pages.isfinite().all()


def test_a_kernel_that_cannot_be_used_is_told(
    static: StaticEstimator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cosy_engine.token2wav.paged_attention", None)
    assert static_estimator._fastest(static.estimator) is PagedPast
    assert "not used" in caplog.text


def test_a_chunk_longer_than_the_shapes_is_served(model: CosyVoiceModel, static: StaticEstimator, monkeypatch) -> None:
    monkeypatch.setattr(static_estimator, "_FRAMES", (20,))
    monkeypatch.setattr(static_estimator, "_PASTS", (30,))
    test_a_stream_sounds_as_without(model, static, HopSettings(), 31)


@torch.inference_mode()
def test_streams_of_one_voice_share_its_prompt(model: CosyVoiceModel, static: StaticEstimator) -> None:
    """What each of them holds does not grow with the prompt."""
    token2wav = Token2Wav(model.flow, model.hift)
    free = [static.pool.free]
    sessions = []
    for seed in range(3):
        sessions.append(token2wav.session(random_prompt(260), HopSettings(), stream=True, seed=seed))
        sessions[-1].push(random_tokens(25))
        complete(sessions[-1].chunk())
        free.append(static.pool.free)
    voice, *streams = (before - after for before, after in zip(free, free[1:], strict=False))
    assert voice > 32 and streams == [4, 4]  # 520 frames; 50 and what the page of the prompt's end has
    del sessions
    assert free[0] - static.pool.free == 33  # the voice's own
