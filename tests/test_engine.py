from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cosy_engine.config import Settings
from cosy_engine.engine import Engine, Synthesis, SynthesisRequest, Timings, _urgency
from cosy_engine.errors import (
    BackendUnavailableError,
    EngineStoppedError,
    InvalidAudioError,
    InvalidRequestError,
    QueueFullError,
    VoiceNotFoundError,
)
from cosy_engine.frontend import Prompt
from cosy_engine.speech_lm.base import SpeechLMRequest

TEXT = "Good morning, this is a test of the engine."


def recording(seconds: float = 3.0, pitch: float = 150.0) -> bytes:
    """A WAV file of a buzzing tone that rises and falls, so that silence trimming leaves it alone."""
    time = np.arange(int(16000 * seconds)) / 16000
    wave = 0.3 * np.sign(np.sin(2 * np.pi * pitch * time)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), 16000, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["cosyvoice2", "cosyvoice3"])
def engine(
    request: pytest.FixtureRequest, standin_v2: Path, standin_v3: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    directory = standin_v2 if request.param == "cosyvoice2" else standin_v3
    settings = Settings(voices_dir=tmp_path_factory.mktemp("voices"), concurrency=2, max_queue=2, device="cpu")
    engine = Engine.load(directory, settings)
    yield engine
    engine.close()


@pytest.fixture
async def prompt(engine: Engine) -> Prompt:
    return await engine.make_prompt(recording(), "what is said in it")


async def listen(synthesis: Synthesis) -> np.ndarray:
    chunks = [chunk.samples async for chunk in synthesis]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)


def test_what_lies_far_back_makes_nobody_more_urgent() -> None:
    now = time.perf_counter()
    stream, whole = SynthesisRequest(TEXT), SynthesisRequest(TEXT, stream=False)
    assert _urgency(stream, Timings(first_audio=0.2, audio_seconds=3.0), now - 100) >= now  # he stopped to listen
    assert _urgency(whole, Timings(first_audio=0.2), now - 100) > now + 5
    assert _urgency(stream, Timings(queue=100.0), now - 100) > now
    assert now < _urgency(stream, Timings(first_audio=0.2, audio_seconds=3.0), now - 2) < now + 1.3


async def test_every_mode_speaks(engine: Engine, prompt: Prompt) -> None:
    from cosy_engine.audio.decode import load_audio

    await engine.enroll("Somebody", recording(), "what is said in it", replace=True)
    voice = engine.voices.list()[-1].id
    requests = [
        SynthesisRequest(TEXT, "zero_shot", prompt=prompt, seed=1),
        SynthesisRequest(TEXT, "cross_lingual", prompt=prompt, seed=1),
        SynthesisRequest(TEXT, "instruct", prompt=prompt, instruct="speak slowly", seed=1),
        SynthesisRequest(TEXT, "zero_shot", voice=voice, seed=1),
        SynthesisRequest(mode="vc", source=load_audio(recording(2.0, 220.0)), prompt=prompt, seed=1),
    ]
    for request in requests:
        synthesis = engine.synthesize(request)
        sound = await listen(synthesis)
        assert len(sound) > 0 and np.isfinite(sound).all() and np.abs(sound).max() <= 1.0, request.mode
        timings = synthesis.timings
        assert timings.audio_seconds == pytest.approx(len(sound) / 24000)
        assert 0 <= timings.queue <= timings.first_token <= timings.first_audio
        assert timings.rtf > 0 and timings.chunks > 0


async def test_a_saved_voice_sounds_like_its_prompt(engine: Engine, prompt: Prompt) -> None:
    voice = await engine.enroll("Same prompt", recording(), "what is said in it", replace=True)
    by_prompt = await listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=5)))
    by_voice = await listen(engine.synthesize(SynthesisRequest(TEXT, voice=voice.id, seed=5)))
    assert np.array_equal(by_prompt, by_voice)


@pytest.mark.parametrize("stream", [True, False])
async def test_company_does_not_change_a_sample(engine: Engine, prompt: Prompt, stream: bool) -> None:
    other = await engine.make_prompt(recording(2.5, 210.0), "another voice")
    requests = [
        SynthesisRequest(TEXT, prompt=prompt, seed=11, stream=stream),
        SynthesisRequest("Something else is said here, at the same time.", prompt=other, seed=12, stream=stream),
    ]
    alone = [await listen(engine.synthesize(request)) for request in requests]
    together = await asyncio.gather(*(listen(engine.synthesize(request)) for request in requests))
    for one, both in zip(alone, together, strict=True):
        assert np.array_equal(one, both)
    assert not np.array_equal(alone[0], alone[1])


async def test_the_seed_that_is_told_reproduces_the_sound(engine: Engine, prompt: Prompt) -> None:
    first = engine.synthesize(SynthesisRequest(TEXT, prompt=prompt))
    sound = await listen(first)
    again = await listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=first.seed)))
    other = await listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=first.seed + 1)))
    assert np.array_equal(sound, again)
    assert not np.array_equal(sound, other)


async def test_streaming_sends_sound_before_the_end(engine: Engine, prompt: Prompt) -> None:
    streamed = engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=3))
    await listen(streamed)
    whole = engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=3, stream=False))
    await listen(whole)
    assert streamed.timings.chunks > whole.timings.chunks == 1
    assert streamed.timings.audio_seconds == pytest.approx(whole.timings.audio_seconds)


class ScriptedLM:
    """Answers with a given number of codes, and writes down after how many it was asked for one more, and when."""

    name = "scripted"

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, []

    async def generate(self, request: SpeechLMRequest) -> AsyncIterator[int]:
        for number in range(self.count):
            self.asked.append((number, request.first, time.perf_counter()))
            await asyncio.sleep(0)
            yield 1000 + number


@pytest.mark.parametrize("more", [-3, -1, 0, 1, 40])
async def test_the_speech_lm_rests_while_the_first_sound_is_made(
    engine: Engine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    first = engine._token2wav.first_tokens(engine.settings.hops)
    speech_lm = ScriptedLM(first + more)
    monkeypatch.setattr(engine, "_speech_lm", speech_lm)
    text = "The first one. " * 30  # several pieces
    heard = [
        (chunk, time.perf_counter()) async for chunk in engine.synthesize(SynthesisRequest(text, prompt=prompt, seed=7))
    ]
    pieces = heard[0][0].pieces
    assert pieces > 1
    assert sum(len(chunk.samples) for chunk, _ in heard) == pieces * (first + more) * 960
    resumed = [when for number, wanted, when in speech_lm.asked if number == wanted]
    assert [wanted for number, wanted, _ in speech_lm.asked if not number] == [first] + (pieces - 1) * [None]
    assert len(resumed) == (more > 0)
    if resumed:
        assert resumed[0] >= heard[0][1]


async def test_the_speech_lm_may_take_longer_where_many_listen(
    engine: Engine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: dict[str, float] = {}

    class Noted(ScriptedLM):
        async def generate(self, request: SpeechLMRequest) -> AsyncIterator[int]:
            patience[names[request.seed]] = request.patience
            async for code in super().generate(request):
                yield code

    names = {1: "alone", 2: "first", 3: "second", 4: "whole"}
    monkeypatch.setattr(engine, "_speech_lm", Noted(10))
    await listen(engine.synthesize(SynthesisRequest("Hello.", prompt=prompt, seed=1)))
    one, other = (engine.synthesize(SynthesisRequest("Hello.", prompt=prompt, seed=seed)) for seed in (2, 3))
    await asyncio.gather(listen(one), listen(other))
    await listen(engine.synthesize(SynthesisRequest("Hello.", prompt=prompt, seed=4, stream=False)))
    assert patience["alone"] == patience["whole"] == 0
    assert 0 < patience["second"] < 0.04  # a code is 0.04 s of sound


async def test_long_text_comes_piece_by_piece_in_order(engine: Engine, prompt: Prompt) -> None:
    text = "This sentence is long enough to stand on its own two feet, whatever the splitter may think of it. " * 4
    pieces = [chunk.piece async for chunk in engine.synthesize(SynthesisRequest(text, prompt=prompt, seed=1))]
    assert pieces == sorted(pieces)
    assert set(pieces) == set(range(max(pieces) + 1)) and len(set(pieces)) > 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_may_want_a_pause_after_each_piece(
    engine: Engine, prompt: Prompt, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pieces() -> list[np.ndarray]:
        request = SynthesisRequest(TEXT * 8, prompt=prompt, seed=3, stream=stream)
        chunks = [chunk async for chunk in engine.synthesize(request)]
        count = chunks[0].pieces
        return [np.concatenate([chunk.samples for chunk in chunks if chunk.piece == piece]) for piece in range(count)]

    plain = await pieces()
    monkeypatch.setattr(engine.model, "pause", 0.25)
    paused = await pieces()
    assert len(plain) == len(paused) > 1
    for before, after in zip(plain, paused, strict=True):
        np.testing.assert_array_equal(after, np.pad(before, (0, engine.model.sample_rate // 4)))


async def test_text_may_arrive_piece_by_piece(engine: Engine, prompt: Prompt) -> None:
    async def words() -> AsyncIterator[str]:
        for word in TEXT.split():
            await asyncio.sleep(0)
            yield word + " "

    assert len(await listen(engine.synthesize(SynthesisRequest(words(), prompt=prompt, seed=1)))) > 0


@pytest.mark.parametrize("closing", ["cancel", "break", "task"])
async def test_leaving_stops_the_work_and_frees_the_place(engine: Engine, prompt: Prompt, closing: str) -> None:
    long_text = "And so on and on it goes without an end in sight. " * 20
    synthesis = engine.synthesize(SynthesisRequest(long_text, prompt=prompt, seed=1))

    async def listen_to_one() -> None:
        async for _ in synthesis:
            if closing == "task":
                await asyncio.sleep(60)
            break

    task = asyncio.create_task(listen_to_one())
    if closing == "task":
        while not synthesis.timings.chunks:
            await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await synthesis.cancel()
    tokens = synthesis.timings.tokens
    assert engine.queue.active == 0
    await asyncio.sleep(0.2)
    assert synthesis.timings.tokens == tokens
    assert len(await listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=1)))) > 0


@pytest.mark.parametrize("delay", [0, 0.03, 0.3])
async def test_another_task_may_cancel_while_somebody_listens(engine: Engine, prompt: Prompt, delay: float) -> None:
    synthesis = engine.synthesize(SynthesisRequest("And so on and on it goes. " * 20, prompt=prompt, seed=1))
    listener = asyncio.create_task(listen(synthesis))
    await asyncio.sleep(delay)
    await synthesis.cancel()
    assert engine.queue.active == 0
    await asyncio.wait_for(listener, 1)
    await synthesis.cancel()


async def test_leaving_the_loop_is_enough(engine: Engine, prompt: Prompt) -> None:
    synthesis = engine.synthesize(SynthesisRequest("And so on and on it goes. " * 20, prompt=prompt, seed=1))
    async for _ in synthesis:
        break
    async with asyncio.timeout(5):
        while engine.queue.active:
            await asyncio.sleep(0.01)
    assert synthesis.timings.chunks >= 1


async def test_a_full_queue_refuses_and_the_others_are_served(engine: Engine, prompt: Prompt) -> None:
    positions: list[list[int]] = [[] for _ in range(5)]
    sounds = await asyncio.gather(
        *(
            listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=1), positions[number].append))
            for number in range(5)
        ),
        return_exceptions=True,
    )
    assert [type(sound) for sound in sounds] == [np.ndarray] * 4 + [QueueFullError]
    assert positions[3] == [2, 1, 0]
    assert all(np.array_equal(sound, sounds[0]) for sound in sounds[:4])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": "?!... 。，"}, "text"),
        ({"text": "word " * 4000}, "text"),
        ({"speed": 0.1}, "speed"),
        ({"seed": -1}, "seed"),
        ({"mode": "instruct"}, "instruct"),
        ({"mode": "vc"}, "source"),
        ({"mode": "song"}, "mode"),
        ({"text": None}, "text"),
        ({"prompt": None}, "voice"),
    ],
)
async def test_bad_requests_are_refused_and_the_next_one_is_served(
    engine: Engine, prompt: Prompt, change: dict, param: str
) -> None:
    good = {"text": TEXT, "prompt": prompt, "seed": 1}
    with pytest.raises(InvalidRequestError) as refused:
        await listen(engine.synthesize(SynthesisRequest(**(good | change))))
    assert refused.value.param == param
    assert len(await listen(engine.synthesize(SynthesisRequest(**good)))) > 0


async def test_unknown_voice(engine: Engine) -> None:
    for voice in ("nobody", "../../etc/passwd", ""):
        with pytest.raises((VoiceNotFoundError, InvalidRequestError)):
            await listen(engine.synthesize(SynthesisRequest(TEXT, voice=voice)))
    assert engine.queue.active == 0


async def test_upstream_exact_changes_the_speed_only_without_streaming(standin_v2: Path, tmp_path: Path) -> None:
    settings = Settings(voices_dir=tmp_path, device="cpu", upstream_exact=True, warm_up=False)
    engine = Engine.load(standin_v2, settings)
    prompt = await engine.make_prompt(recording(), "x")
    with pytest.raises(InvalidRequestError):
        engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, speed=2.0))
    lengths = [
        len(await listen(engine.synthesize(SynthesisRequest(TEXT, prompt=prompt, seed=1, stream=False, speed=speed))))
        for speed in (1.0, 2.0)
    ]
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=0.02)
    engine.close()


async def test_a_recording_is_computed_once_whatever_its_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    make = engine.frontend.make_prompt
    monkeypatch.setattr(engine.frontend, "make_prompt", lambda data: computed.append(data) or make(data))
    data = recording(2.0, 333.0)
    texts = ["one thing", "one thing", "another thing", ""]
    prompts = await asyncio.gather(*(engine.make_prompt(data, text) for text in texts))
    assert computed == [data]
    assert [prompt.text for prompt in prompts] == texts
    assert len(prompts[0].text_token) > 0 == len(prompts[3].text_token)
    for prompt in prompts:
        assert torch.equal(prompt.speech_feat, prompts[0].speech_feat)


async def test_a_recording_that_failed_is_tried_again(engine: Engine) -> None:
    for _ in range(2):
        with pytest.raises(InvalidAudioError):
            await engine.make_prompt(recording(0.3))


async def test_closing_ends_what_is_in_flight(standin_v2: Path, tmp_path: Path) -> None:
    engine = Engine.load(standin_v2, Settings(voices_dir=tmp_path, device="cpu"))
    prompt = await engine.make_prompt(recording(), "x")
    requests = [SynthesisRequest("And on it goes. " * 100, prompt=prompt, seed=seed) for seed in range(6)]
    running = [engine.synthesize(request) for request in requests]
    listeners = [asyncio.create_task(listen(synthesis)) for synthesis in running]
    while not all(synthesis.timings.chunks for synthesis in running[: engine.queue.concurrency]):
        await asyncio.sleep(0.01)
    await asyncio.to_thread(engine.close)
    ends = await asyncio.gather(*listeners, return_exceptions=True)
    assert [type(end) for end in ends] == [EngineStoppedError] * len(requests)
    with pytest.raises(EngineStoppedError):
        engine.synthesize(SynthesisRequest(TEXT, prompt=prompt))


def test_a_backend_that_is_not_there_is_an_error_when_asked_for(standin_v2: Path) -> None:
    with pytest.raises(BackendUnavailableError):
        Engine.load(standin_v2, Settings(flow_backend="tensorrt"))


async def test_a_saved_voice_costs_no_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request runs no ONNX model, and of the prompt the flow sees only the three tokens that look ahead."""
    voice = await engine.enroll("Costs nothing", recording(2.0, 333.0), "what is said in it", replace=True)
    fed: list[int] = []
    flow = type(engine.model.flow)
    begin_chunk = flow.begin_chunk

    def counting(self, token, cond, *arguments, **options):
        fed.append(cond.shape[2])
        return begin_chunk(self, token, cond, *arguments, **options)

    def refuse(*arguments: object) -> None:
        raise AssertionError("an ONNX model was run")

    monkeypatch.setattr(flow, "begin_chunk", counting)
    for name in ("SpeechTokenizer", "SpeakerEncoder"):
        monkeypatch.setattr(f"cosy_engine.frontend.{name}.__call__", refuse)
    synthesis = engine.synthesize(SynthesisRequest(TEXT, voice=voice.id, seed=3))
    await listen(synthesis)
    assert sum(fed) == 2 * (3 + synthesis.timings.tokens)


async def test_a_text_that_stalls_gives_its_place_back(
    engine: Engine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stalling() -> AsyncIterator[str]:
        yield "A beginning "
        await asyncio.sleep(3600)

    monkeypatch.setattr("cosy_engine.engine._TEXT_PAUSE", 0.2)
    with pytest.raises(InvalidRequestError, match="No more text"):
        await listen(engine.synthesize(SynthesisRequest(stalling(), prompt=prompt)))
    assert engine.queue.active == 0
