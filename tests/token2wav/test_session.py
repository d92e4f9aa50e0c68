"""A stream must give, sample for sample, what one pass over the whole utterance gives under the same chunk masks."""

from __future__ import annotations

import pytest
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.token2wav.hops import PACES, hops
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import complete
from tests.feeds import mask_as_fed

SAMPLES_PER_TOKEN = 960
TOLERANCE = 1e-3  # the phase of the sine source amplifies the rounding of the mel


def random_prompt(tokens: int, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        text="",
        text_token=torch.zeros(0, dtype=torch.int32),
        speech_token=torch.randint(0, 6561, (tokens,), generator=generator, dtype=torch.int32),
        speech_feat=torch.randn(2 * tokens, 80, generator=generator),
        embedding=torch.randn(192, generator=generator),
    )


def random_tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 6561, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def run(session: Session, tokens: list[int], push: int = 1) -> list[torch.Tensor]:
    """Feed `push` tokens at a time, taking every chunk as soon as it is ready."""
    chunks = []
    for start in range(0, len(tokens), push):
        session.push(tokens[start : start + push])
        while session.ready:
            chunks.append(complete(session.chunk()))
    session.finish()
    while not session.done:
        chunks.append(complete(session.chunk()))
    return chunks


def feed_ends(model: CosyVoiceModel, prompt_tokens: int, tokens: int, settings: HopSettings) -> list[int]:
    """Where a stream's calls of the flow end: the prompt but for its last three tokens, then hop by hop."""
    first = settings.token_hop_len_first or 22
    following = hops(first, model.hift.lookahead_frames / 2, PACES["cpu"], settings)
    ends = [max(0, prompt_tokens - 3), prompt_tokens + first]
    while ends[-1] + 3 <= prompt_tokens + tokens:
        ends.append(ends[-1] + next(following))
    return [end for end in (*ends[:-1], prompt_tokens + tokens) if end]


@torch.inference_mode()
def whole_pass(
    monkeypatch: pytest.MonkeyPatch, model: CosyVoiceModel, prompt: Prompt, tokens: list[int], hops: HopSettings
) -> torch.Tensor:
    """One flow call over everything with a stream's masks, one vocoder call over all of its mel."""
    with monkeypatch.context() as patch:
        mask_as_fed(patch, feed_ends(model, len(prompt.speech_token), len(tokens), hops))
        mel = model.flow.inference(
            torch.tensor([tokens], dtype=torch.int32),
            prompt.speech_token[None],
            prompt.speech_feat[None],
            prompt.embedding[None],
            streaming=True,
            finalize=True,
        )
    state = model.hift.init_state(1, torch.device("cpu"), torch.float32, seed=7)
    return model.hift.forward_chunk(mel, state, finalize=True)[0]


HOPS = {
    "default": HopSettings(),
    "25": HopSettings(token_max_hop_len=25),
    "50": HopSettings(token_hop_len_first=50, token_hop_len=50),
    "100": HopSettings(token_hop_len_first=100, token_hop_len=100),
    "first5": HopSettings(token_hop_len_first=5),
}


@pytest.mark.parametrize("prompt_tokens", [0, 25, 31, 77])
@pytest.mark.parametrize("hops", HOPS.values(), ids=HOPS.keys())
def test_stream_equals_one_whole_pass(
    monkeypatch: pytest.MonkeyPatch, model: CosyVoiceModel, hops: HopSettings, prompt_tokens: int
) -> None:
    prompt, tokens = random_prompt(prompt_tokens), random_tokens(193)
    chunks = run(Token2Wav(model.flow, model.hift).session(prompt, hops, stream=True, seed=7), tokens)
    streamed = torch.cat(chunks)
    assert len(chunks) > 1
    assert len(streamed) == len(tokens) * SAMPLES_PER_TOKEN
    expected = whole_pass(monkeypatch, model, prompt, tokens, hops)
    torch.testing.assert_close(streamed, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("hops", HOPS.values(), ids=HOPS.keys())
def test_without_memory_for_it_a_stream_sounds_the_same(model: CosyVoiceModel, hops: HopSettings) -> None:
    prompt, tokens = random_prompt(31), random_tokens(193)
    remembering, forgetting = (
        torch.cat(run(Token2Wav(model.flow, model.hift, **given).session(prompt, hops, stream=True, seed=7), tokens))
        for given in ({}, {"stream_memory": 0})
    )
    torch.testing.assert_close(forgetting, remembering, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 21, 22, 24, 25, 26, 28, 29])
def test_short_utterances_lose_nothing(monkeypatch: pytest.MonkeyPatch, model: CosyVoiceModel, count: int) -> None:
    prompt, tokens = random_prompt(31), random_tokens(count)
    streamed = torch.cat(
        run(Token2Wav(model.flow, model.hift).session(prompt, HopSettings(), stream=True, seed=7), tokens)
    )
    assert len(streamed) == count * SAMPLES_PER_TOKEN
    expected = whole_pass(monkeypatch, model, prompt, tokens, HopSettings())
    torch.testing.assert_close(streamed, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("stream", [True, False])
def test_the_sound_does_not_depend_on_when_tokens_arrive(model: CosyVoiceModel, stream: bool) -> None:
    prompt, tokens, token2wav = random_prompt(31), random_tokens(120), Token2Wav(model.flow, model.hift)
    one_by_one, at_once = (
        run(token2wav.session(prompt, HopSettings(), stream=stream, seed=7), tokens, push) for push in (1, 120)
    )
    assert [len(chunk) for chunk in one_by_one] == [len(chunk) for chunk in at_once]
    assert torch.equal(torch.cat(one_by_one), torch.cat(at_once))


def test_interleaved_streams_do_not_touch_each_other(model: CosyVoiceModel) -> None:
    token2wav, tokens = Token2Wav(model.flow, model.hift), [random_tokens(120, seed) for seed in (1, 2)]
    prompts = [random_prompt(31, 3), random_prompt(40, 4)]
    alone = [
        torch.cat(run(token2wav.session(prompt, HopSettings(), stream=True, seed=7), own))
        for prompt, own in zip(prompts, tokens, strict=True)
    ]
    sessions = [token2wav.session(prompt, HopSettings(), stream=True, seed=7) for prompt in prompts]
    together: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for session, own in zip(sessions, tokens, strict=True):
            session.push(own)
            session.finish()
        while not all(session.done for session in sessions):
            for session, chunks in zip(sessions, together, strict=True):
                if not session.done:
                    chunks.append(complete(session.chunk()))
    for chunks, expected in zip(together, alone, strict=True):
        assert torch.equal(torch.cat(chunks), expected)


@pytest.mark.parametrize("stream", [True, False])
def test_no_tokens_make_no_sound(model: CosyVoiceModel, stream: bool) -> None:
    session = Token2Wav(model.flow, model.hift).session(random_prompt(31), HopSettings(), stream=stream, seed=7)
    assert run(session, []) == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("speed", [0.5, 1.3, 2.0])
def test_speed_changes_the_length(model: CosyVoiceModel, stream: bool, speed: float) -> None:
    session = Token2Wav(model.flow, model.hift).session(
        random_prompt(31), HopSettings(), stream=stream, seed=7, speed=speed
    )
    sound = torch.cat(run(session, random_tokens(120)))
    assert len(sound) == int(240 / speed) * 480


def test_public_behaviour_keeps_the_grown_hop(model: CosyVoiceModel) -> None:
    """As published: the first request leaves its hop of 100 behind, so the same second request is one chunk."""
    token2wav = Token2Wav(model.flow, model.hift, upstream_exact=True)
    first, second = (
        run(token2wav.session(random_prompt(31), HopSettings(), stream=True, seed=7), random_tokens(118))
        for _ in range(2)
    )
    assert (len(first), len(second)) == (3, 1)
    assert len(torch.cat(first)) == len(second[0]) == 118 * SAMPLES_PER_TOKEN
