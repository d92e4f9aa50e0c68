"""What listeners hear of an engine: when the sound begins, whether it has gaps, how much there is of it."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.chunks import chunk_figures
from benchmarks.engines import SPOKEN, TEXT, recording
from cosy_engine.config import HopSettings
from cosy_engine.engine import Engine, SynthesisRequest

START_BUFFER = 0.3  # seconds a player holds back before it starts
Result = dict[str, Any]
Listen = Callable[[int], Awaitable[None]]


@dataclass
class Heard:
    """What one listener has heard so far; he plays what he gets once START_BUFFER seconds are there."""

    asked: float
    first: float | None = None  # seconds until the first sound
    underruns: int = 0
    rtf: float | None = None  # when everything is there
    error: str = ""  # why the rest did not come
    playing_since: float | None = None
    chunks: list[tuple[float, float]] = field(default_factory=list)  # when each came, and seconds of sound

    def audio(self, until: float = math.inf) -> float:
        """Seconds of sound that came until a moment."""
        return sum(seconds for came, seconds in self.chunks if came <= until)

    def arrives(self, seconds: float, now: float) -> None:
        """More sound."""
        if self.first is None:
            self.first = now - self.asked
        if self.playing_since is not None and now - self.playing_since > self.audio():
            self.underruns += 1
            self.playing_since = now - self.audio()
        self.chunks.append((now, seconds))
        if self.playing_since is None and self.audio() >= START_BUFFER:
            self.playing_since = now


async def first_audio(engine: Engine, request: SynthesisRequest) -> float:
    """Seconds from the request to the first sound; the rest is cancelled."""
    synthesis = engine.synthesize(request)
    async for _ in synthesis:
        break
    await synthesis.cancel()
    return synthesis.timings.first_audio


async def measure_first_audio(engine: Engine, voice: str, rounds: int, limit: float) -> dict[str, Any]:
    """First audio with a recording that is new to the engine, all that its prompt needs included, and with a saved
    voice; medians."""
    deadline = time.perf_counter() + limit
    await first_audio(engine, SynthesisRequest(TEXT, voice=voice, seed=0))
    cold: list[float] = []
    warm: list[float] = []
    while len(cold) < rounds and (not cold or time.perf_counter() < deadline):
        seed = len(cold) + 1
        started = time.perf_counter()
        prompt = await engine.make_prompt(recording(seed), SPOKEN)
        made = time.perf_counter() - started
        cold.append(made + await first_audio(engine, SynthesisRequest(TEXT, prompt=prompt, seed=seed)))
        warm.append(await first_audio(engine, SynthesisRequest(TEXT, voice=voice, seed=seed)))
    result = {"cold_prompt": statistics.median(cold), "warm_voice": statistics.median(warm), "rounds": len(cold)}
    if len(cold) < rounds:
        result["cut"] = f"{len(cold)} of {rounds} rounds in {limit:.0f} s"
    return result | {"warm_over_cold": result["warm_voice"] / result["cold_prompt"]}


async def measure_long_stream(engine: Engine, voice: str, hop: HopSettings, rounds: int, limit: float) -> Result:
    """Seconds from one chunk to the next of a stream of equal chunks, as its only listener gets them; medians.

    The speech LM is at work beside it until it has said all; if it is the slower one, this is how long the codes take.
    After `limit` seconds no further round begins, and the first one ends where it is.
    """
    usual, deadline = engine.settings, time.perf_counter() + limit
    engine.settings = usual.model_copy(update={"hops": hop})
    runs: list[list[float]] = []
    whole = True
    try:
        while len(runs) < rounds and (not runs or time.perf_counter() < deadline):
            came = [time.perf_counter()]
            synthesis = engine.synthesize(SynthesisRequest(TEXT, voice=voice, seed=0))
            async for _ in synthesis:
                came.append(time.perf_counter())
                if not runs and came[-1] > deadline:
                    whole = False
                    break
            await synthesis.cancel()
            runs.append([after - before for before, after in pairwise(came)])
    finally:
        engine.settings = usual
    return chunk_figures(runs, rounds, limit, whole=whole)


async def measure_closed_loop(engine: Engine, voice: str, listeners: int, requests: int, limit: float) -> Result:
    """Each of the listeners asks again as soon as all of his sound has been made; after one request each that do not
    count, in which the engine meets this number of listeners for the first time."""
    await _closed_loop(engine, voice, listeners, listeners, limit / 2)
    return {"listeners": listeners} | await _closed_loop(engine, voice, listeners, requests, limit)


async def measure_poisson(engine: Engine, voice: str, rate: float, limit: float) -> Result:
    """Requests arrive at random, `rate` a second, during half the limit; all of it is heard within the limit."""
    gaps = random.Random(0)

    async def arrivals(listen: Listen) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(listen(number))
                await asyncio.sleep(gaps.expovariate(rate))

    requests = max(4, round(rate * limit / 2))
    return {"rate": rate} | await _measure(engine, voice, requests, limit, arrivals)


async def measure_first_hops(
    engine: Engine, voice: str, hops: Sequence[int], rounds: int, limit: float
) -> list[Result]:
    """One listener whose first chunk has so many tokens."""
    usual, results = engine.settings, []
    for hop in hops:
        engine.settings = usual.model_copy(update={"hops": HopSettings(token_hop_len_first=hop)})
        await _closed_loop(engine, voice, 1, 1, limit / 2)
        results.append({"first_hop": hop} | await _closed_loop(engine, voice, 1, rounds, limit))
    engine.settings = usual
    return results


async def _closed_loop(engine: Engine, voice: str, listeners: int, requests: int, limit: float) -> Result:
    numbers = iter(range(requests))
    left: list[float] = []

    async def loop(listen: Listen) -> None:
        async def listener() -> None:
            for number in numbers:
                await listen(number)
            left.append(time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(listeners):
                group.create_task(listener())

    return await _measure(engine, voice, requests, limit, loop, left)


async def _measure(
    engine: Engine,
    voice: str,
    requests: int,
    limit: float,
    crowd: Callable[[Listen], Awaitable[None]],
    left: Sequence[float] = (),
) -> Result:
    """Let a crowd listen until it has heard all, or the limit has passed: what has been heard until then counts.

    Args:
        left: when listeners left who had nothing more to ask; filled in meanwhile.
    """
    everyone: list[Heard] = []

    async def listen(number: int) -> None:
        heard = Heard(time.perf_counter())
        everyone.append(heard)
        synthesis = engine.synthesize(SynthesisRequest(TEXT, voice=voice, seed=number))
        try:
            async for chunk in synthesis:
                heard.arrives(len(chunk.samples) / chunk.sample_rate, time.perf_counter())
            heard.rtf = synthesis.timings.rtf
        except Exception as error:  # the others' figures still count
            heard.error = f"{type(error).__name__}: {error}"

    on_gpu = engine.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.model.device)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(limit):
            await crowd(listen)
    except TimeoutError:
        pass
    result = summary(everyone, requests, started, time.perf_counter(), left)
    if on_gpu:
        result["peak_memory"] = torch.cuda.max_memory_allocated(engine.model.device)
    return result


def summary(
    everyone: Sequence[Heard], requests: int, started: float, ended: float, left: Sequence[float] = ()
) -> Result:
    """Figures of all listeners together; None where nobody has heard enough.

    Args:
        left: when listeners left. From the first one on fewer than all listened, so sound does not count that came
            later, unless there are errors, with which one leaves early.
    """
    errors = [heard.error for heard in everyone if heard.error]
    until = ended if errors else min(left, default=ended)
    first = [heard.first for heard in everyone if heard.first is not None]
    rtf = [heard.rtf for heard in everyone if heard.rtf is not None]
    result = {
        "ttfa_p50": float(np.percentile(first, 50)) if first else None,
        "ttfa_p95": float(np.percentile(first, 95)) if first else None,
        "rtf_p50": float(np.percentile(rtf, 50)) if rtf else None,
        "audio_per_second": sum(heard.audio(until) for heard in everyone) / (until - started),
        "underruns": sum(heard.underruns for heard in everyone),
        "requests": len(rtf),
    }
    if errors:
        result["failed"] = f"{len(errors)} requests, the first with {errors[0]}"
    if len(rtf) + len(errors) < requests:
        silent = sum(heard.first is None and not heard.error for heard in everyone)
        result["cut"] = (
            f"{len(rtf)} of {requests} requests heard in {ended - started:.0f} s, {silent} still waiting for sound"
        )
    return result
