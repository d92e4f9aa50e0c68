"""Where the time of a chunk goes: the speech LM, the voice, and the parts of token2wav."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from benchmarks.engines import PROMPT_SECONDS, TOKENS_PER_SECOND, UNBOUNDED, made_up_prompt, made_up_tokens
from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.speech_lm.base import SpeechLM, SpeechLMRequest
from cosy_engine.token2wav.static_vocoder import StaticVocoder
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import Encode, EulerSteps, Making, Vocode

PROMPT, ENCODER, HOST = "voice (once)", "flow encoder", "host"
LM = "speech LM"
WORK = {Encode: ENCODER, EulerSteps: "estimator, all steps", Vocode: "vocoder"}
PARTS = (LM, PROMPT, *WORK.values(), HOST)
_BEFORE = 3  # seconds of speech before the chunks in the middle of a stream
_HOPS = HopSettings(token_hop_len_first=_BEFORE * TOKENS_PER_SECOND, token_max_hop_len=25)
_LM_ROUNDS = 3
_LM_TEXT = list(range(50))
_AHEAD = 60_000_000  # GPU cycles, some 30 ms: so long the GPU waits for the host to give it a part


class Stopwatch:
    """Seconds of each part: on a CPU of the wall, on a GPU of the device alone.

    Before each part a GPU is kept busy for long enough that the host can give it the part meanwhile, so that it hardly
    waits for the host within a part.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self._on_gpu:
            torch.cuda._sleep(_AHEAD)
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        parts: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            parts[name] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        return parts

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _NoStopwatch(Stopwatch):
    """Measures nothing and changes nothing."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield


def measure_stages(
    model: CosyVoiceModel, speech_lm: SpeechLM, streams: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds of each part of the first chunk in a voice that is new, then of a chunk some seconds later: what
    each stream takes, for some numbers of streams in one batch.

    The speech LM is measured by itself, on the wall; `host` is what the rest takes on the wall beyond its parts.
    """
    if model.device.type == "cuda":
        model = replace(model, hift=StaticVocoder(model.hift, graphs=True))
    first_tokens, hop = model.flow.chunk_size, 25
    chunks = {"first chunk, new voice": (1, _first_chunk(model, rounds))}
    for count in streams:
        chunks[f"later chunk, {count} at once"] = count, _later_chunk(model, count, rounds)
    results = []
    for what, (count, parts) in chunks.items():
        measured = [asyncio.run(_lm_seconds(speech_lm, model, count, first_tokens, hop)) for _ in range(_LM_ROUNDS)]
        first, later = map(statistics.median, zip(*measured, strict=True))
        parts[LM] = first if PROMPT in parts else later
        milliseconds = {name: 1000 * parts[name] for name in PARTS if name in parts}
        results.append({"what": what, "milliseconds": milliseconds})
    return results


@torch.inference_mode()
def _first_chunk(model: CosyVoiceModel, rounds: int) -> dict[str, float]:
    token2wav, tokens = Token2Wav(model.flow, model.hift, **UNBOUNDED), made_up_tokens(30, model, seed=1)

    def chunk(number: int, watch: Stopwatch) -> None:
        session = token2wav.session(
            made_up_prompt(PROMPT_SECONDS, model, seed=number), HopSettings(), stream=True, seed=0
        )
        session.push(tokens)
        with watch.part(PROMPT):
            _drive([session.prepare()], _NoStopwatch(model.device))
        _drive([session.chunk()], watch)

    return _medians(chunk, model.device, rounds)


@torch.inference_mode()
def _later_chunk(model: CosyVoiceModel, count: int, rounds: int) -> dict[str, float]:
    token2wav, prompt = Token2Wav(model.flow, model.hift, **UNBOUNDED), made_up_prompt(PROMPT_SECONDS, model)
    tokens = made_up_tokens((_BEFORE + 2 * rounds + 4) * TOKENS_PER_SECOND, model, seed=1)
    sessions: list[Session] = []
    for seed in range(count):
        session = token2wav.session(prompt, _HOPS, stream=True, seed=seed)
        session.push(tokens)
        for making in (session.prepare(), session.chunk()):
            _drive([making], _NoStopwatch(model.device))
        sessions.append(session)

    def chunks(_: int, watch: Stopwatch) -> None:
        _drive([session.chunk() for session in sessions], watch)

    return {name: seconds / count for name, seconds in _medians(chunks, model.device, rounds).items()}


def _medians(chunk: Callable[[int, Stopwatch], None], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of each part and of the host. On a GPU the wall is measured apart from the parts, which delay it."""
    numbers = iter(range(2 * rounds + 1))
    chunk(next(numbers), _NoStopwatch(device))
    measured = []
    for _ in range(rounds):
        watch, started = Stopwatch(device), time.perf_counter()
        chunk(next(numbers), watch)
        wall, parts = time.perf_counter() - started, watch.seconds()
        if device.type == "cuda":
            started = time.perf_counter()
            chunk(next(numbers), _NoStopwatch(device))
            wall = time.perf_counter() - started
        measured.append(parts | {HOST: max(0.0, wall - sum(parts.values()))})
    return {name: statistics.median(parts[name] for parts in measured) for name in measured[0]}


def _drive(makings: Sequence[Making[Any]], watch: Stopwatch) -> None:
    """Drive generators that do equal work to their ends, all in one batch, and fetch their sound."""
    works = [next(making, None) for making in makings]
    while works[0] is not None:
        kind = type(works[0])
        while not works[0].done:
            with watch.part(WORK[kind]):
                kind.run(works)
        if kind is Vocode:
            for work in works:
                work.sound.cpu()
        with watch.part(ENCODER) if kind is Encode else nullcontext():
            works = [next(making, None) for making in makings]


async def _lm_seconds(
    speech_lm: SpeechLM, model: CosyVoiceModel, count: int, first: int, hop: int
) -> tuple[float, float]:
    """Seconds until a stream has its first tokens, and what the next `hop` take of each; `count` streams at once."""

    async def listen(seed: int) -> list[float]:
        prompt_speech = made_up_tokens(PROMPT_SECONDS * TOKENS_PER_SECOND, model, seed)
        request = SpeechLMRequest(_LM_TEXT, _LM_TEXT[:15], prompt_speech, seed)
        async with aclosing(speech_lm.generate(request)) as tokens:
            return [time.perf_counter() async for _ in _first(first + hop, tokens)]

    started = time.perf_counter()
    streams = await asyncio.gather(*map(listen, range(count)))
    begun = statistics.median(moments[first - 1] for moments in streams)
    return begun - started, (max(moments[-1] for moments in streams) - begun) / count


async def _first(count: int, tokens: AsyncIterator[int]) -> AsyncIterator[int]:
    for _ in range(count):
        yield await anext(tokens)
