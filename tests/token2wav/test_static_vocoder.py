"""The function that is captured on a GPU is tested as it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.hift import CausalHiFTGenerator, HiFTGenerator
from cosy_engine.modules.streaming import State
from cosy_engine.token2wav import static_vocoder
from cosy_engine.token2wav.hops import PACES
from cosy_engine.token2wav.static_vocoder import ChunkFrames, StaticVocoder
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import Vocode, complete
from tests.modules.test_hift import PREDICTORS, make_hift, vocode_whole
from tests.token2wav.test_session import random_prompt, random_tokens, run

FRAMES = ChunkFrames(first=(16, 30, 44))
TOKENS = random_tokens(170)
both = pytest.mark.parametrize("kind", list(PREDICTORS))
Capturing = tuple[StaticVocoder, list[torch.device]]


def capturing(hift: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Capturing:
    """A vocoder, and the devices of what it captures."""
    vocoder, devices = StaticVocoder(hift, graphs=False, frames=FRAMES), []
    monkeypatch.setattr(vocoder, "_capture", lambda run, device: devices.append(device) or run)
    return vocoder, devices


@pytest.fixture
def captured(model: CosyVoiceModel, monkeypatch: pytest.MonkeyPatch) -> Capturing:
    return capturing(model.hift, monkeypatch)


class Stream:
    """A mel that is fed in chunks of these lengths."""

    def __init__(self, vocoder: StaticVocoder, lengths: Sequence[int], seed: int) -> None:
        self.seed, self.lengths = seed, list(lengths)
        self.mel = torch.randn(1, 80, sum(lengths), generator=torch.Generator().manual_seed(seed))
        self.state: State = vocoder.init_state(1, "cpu", seed=seed)
        self.fed, self.sounds = 0, []

    def next_chunk(self) -> tuple[Tensor, bool]:
        length = self.lengths.pop(0)
        self.fed += length
        return self.mel[:, :, self.fed - length : self.fed], not self.lengths

    def check(self, hift: HiFTGenerator) -> None:
        """It has all samples, and those that it has alone."""
        expected, sound = vocode_whole(hift, self.mel, seed=self.seed), torch.cat(self.sounds, dim=1)
        torch.testing.assert_close(sound, expected, atol=1e-5, rtol=0)


def feed(vocoder: StaticVocoder, streams: Sequence[Stream]) -> None:
    """The next chunk of each, in one batch."""
    mels, finalize = zip(*(stream.next_chunk() for stream in streams), strict=True)
    states = [stream.state for stream in streams]
    pairs = zip(mels, states, finalize, strict=True)
    assert len({vocoder.batch_key(mel, state, finalize=end) for mel, state, end in pairs}) == 1
    for stream, sound in zip(streams, vocoder.forward_chunks(mels, states, finalize), strict=True):
        stream.sounds.append(sound)


@torch.inference_mode()
@both
def test_a_last_chunk_of_any_length_is_exact(kind: type[HiFTGenerator], monkeypatch) -> None:
    hift = make_hift(kind)
    vocoder, devices = capturing(hift, monkeypatch)
    for last in [*range(31), 54, 80, 81, 180, 204]:
        stream = Stream(vocoder, [30, 10, last], seed=last)
        for _ in range(3):
            feed(vocoder, [stream])
        stream.check(hift)
        assert stream.sounds[0].shape[1] + stream.sounds[1].shape[1] == hift.samples_ready(40)
        assert stream.state == {}
    assert len(devices) == 1 + 6  # a first chunk, and all numbers of frames later


@torch.inference_mode()
@both
def test_chunks_that_are_last_and_others_in_one_batch(kind: type[HiFTGenerator], monkeypatch) -> None:
    hift = make_hift(kind)
    vocoder, devices = capturing(hift, monkeypatch)
    ending = [Stream(vocoder, lengths, seed) for seed, lengths in enumerate([[30, 50, 23], [30, 50, 16]])]
    lasting = [Stream(vocoder, lengths, seed) for seed, lengths in enumerate([[30, 50, 50, 50, 12], [30, 50, 50, 30]])]
    late = Stream(vocoder, [30, 50, 50, 25], seed=7)
    feed(vocoder, [*ending, *lasting])
    feed(vocoder, [*lasting, *ending])
    feed(vocoder, [late])
    feed(vocoder, [late, *ending, *lasting])  # at different places of the noise; five rows become eight
    feed(vocoder, [*lasting, late])
    feed(vocoder, [late])
    feed(vocoder, lasting[:1])
    for stream in (*ending, *lasting, late):
        stream.check(hift)
    assert len(devices) == len(vocoder._steps)


@torch.inference_mode()
@both
def test_streams_of_one_batch_do_not_touch_each_other(kind: type[HiFTGenerator], monkeypatch) -> None:
    vocoder, _ = capturing(make_hift(kind), monkeypatch)
    heard = []
    for loudness, lengths in [(1, [30, 50, 50, 20]), (1000, [30, 50, 17])]:
        stream, other = Stream(vocoder, [30, 50, 50, 16], seed=0), Stream(vocoder, lengths, seed=1)
        other.mel *= loudness
        for _ in lengths:
            feed(vocoder, [stream, other])
        while stream.lengths:
            feed(vocoder, [stream])
        heard.append(torch.cat(stream.sounds, dim=1))
    torch.testing.assert_close(heard[0], heard[1], atol=1e-6, rtol=0)


@torch.inference_mode()
@both
def test_unusual_chunks_run_as_they_are(kind: type[HiFTGenerator], monkeypatch) -> None:
    """Short first chunks, other lengths than usual, ends that are too long or come at once."""
    hift = make_hift(kind)
    vocoder, _ = capturing(hift, monkeypatch)
    for lengths in ([4, 0, 7, 33, 60], [3], [31, 0, 47, 300, 226], [30, 250]):
        streams = [Stream(vocoder, lengths, seed) for seed in (0, 1)]
        for _ in lengths:
            feed(vocoder, streams)
        for stream in streams:
            stream.check(hift)
    assert set(vocoder._steps) == {(2, 100, True), (2, 30, False)}  # the 60 at the end, the 30 at the start


@torch.inference_mode()
@both
def test_a_batch_that_is_too_large_is_done_in_parts(kind: type[HiFTGenerator], monkeypatch) -> None:
    monkeypatch.setattr(static_vocoder, "_MOST_FRAMES", 200)
    hift = make_hift(kind)
    vocoder, _ = capturing(hift, monkeypatch)
    streams = [Stream(vocoder, [30, 50, 17], seed) for seed in range(7)]
    for _ in range(3):
        feed(vocoder, streams)
    for stream in streams:
        stream.check(hift)
    assert {rows * frames <= 200 for rows, frames, _ in vocoder._steps} == {True}


@torch.inference_mode()
@both
def test_a_state_has_one_form_after_any_first_chunk(kind: type[HiFTGenerator], monkeypatch) -> None:
    hift = make_hift(kind)
    vocoder, _ = capturing(hift, monkeypatch)
    for first in [*range(1, 60), 100, 200]:
        state = hift.init_state(1, "cpu")
        hift.forward_chunk(torch.randn(1, 80, first), state, finalize=False)
        del state["m_source"]["noise_position"]
        assert vocoder._form.fits(state) == (first >= hift.lookahead_frames)


@torch.inference_mode()
@pytest.mark.parametrize("streams", [1, 3])
def test_what_is_warmed_up_is_not_captured_again(model: CosyVoiceModel, captured: Capturing, streams: int) -> None:
    vocoder, devices = captured
    vocoder.warm_up(streams)
    count = len(devices)
    assert count == (9 - (vocoder.lookahead_frames > 16)) * streams  # 3 streams: 1, 2, 4
    for seed in (0, 1):
        run(Token2Wav(model.flow, vocoder).session(random_prompt(31), HopSettings(), stream=True, seed=seed), TOKENS)
    assert len(devices) == count


def test_the_usual_numbers_of_frames_are_those_of_a_models_streams(model: CosyVoiceModel) -> None:
    frames = ChunkFrames.of(model.flow, model.hift, HopSettings(), PACES["cuda"])
    if type(model.hift) is HiFTGenerator:
        assert frames == ChunkFrames((30,), (10, 20, 50, 100, 200, 224))
    else:
        assert type(model.hift) is CausalHiFTGenerator
        assert frames == ChunkFrames((16,), (20, 50, 100, 200, 209))
    assert ChunkFrames.of(model.flow, model.hift, HopSettings(token_hop_len_first=25), PACES["cpu"]).first == (50,)


def test_streams_sound_as_without(model: CosyVoiceModel, captured: Capturing) -> None:
    vocoder, devices = captured
    for seed, speed in [(0, 1.0), (1, 1.0), (2, 1.3), (3, 1.0)]:
        prompt, tokens = random_prompt(31, seed), random_tokens(170, seed)
        static, plain = (
            torch.cat(run(token2wav.session(prompt, HopSettings(), stream=True, seed=seed, speed=speed), tokens))
            for token2wav in (Token2Wav(model.flow, vocoder), Token2Wav(model.flow, model.hift))
        )
        torch.testing.assert_close(static, plain, atol=1e-5, rtol=0)
    assert devices


@torch.inference_mode()
def test_a_batch_sounds_as_one_after_the_other(model: CosyVoiceModel, captured: Capturing) -> None:
    vocoder, devices = captured
    mels = [torch.randn(1, 80, 130, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    chunks = [(0, 30), (30, 80), (80, 130)]

    def works(hift: nn.Module) -> list[list[Vocode]]:
        states = [model.hift.init_state(1, "cpu", seed=seed) for seed in (0, 1)]
        return [
            [Vocode(hift, mel[:, :, a:b], state, finalize=b == 130) for mel, state in zip(mels, states, strict=True)]
            for a, b in chunks
        ]

    for _ in range(2):  # the second time from what was captured
        for together, apart in zip(works(vocoder), works(model.hift), strict=True):
            Vocode.run(together)
            for work, alone in zip(together, apart, strict=True):
                Vocode.run([alone])
                torch.testing.assert_close(work.sound, alone.sound, atol=1e-5, rtol=0)
    assert len(devices) == len(vocoder._steps)


def test_a_whole_utterance_is_the_vocoders_own(model: CosyVoiceModel, captured: Capturing) -> None:
    vocoder, _ = captured
    static, plain = (complete_whole(Token2Wav(model.flow, hift), random_tokens(60)) for hift in (vocoder, model.hift))
    assert torch.equal(static, plain)


def complete_whole(token2wav: Token2Wav, tokens: list[int]) -> Tensor:
    session = token2wav.session(random_prompt(31), HopSettings(), stream=False, seed=5)
    session.push(tokens)
    session.finish()
    with torch.inference_mode():
        return complete(session.chunk())
