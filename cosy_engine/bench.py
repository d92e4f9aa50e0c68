"""Measuring an engine: the same texts spoken by more and more listeners at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cosy_engine.audio.encode import wav_bytes
from cosy_engine.engine import Engine, Synthesis, SynthesisRequest
from cosy_engine.errors import CosyError, InvalidRequestError

MAX_LEVEL = 256
REQUESTS_PER_LISTENER = 2  # at least so many, or the start of a level would weigh too much


def read_levels(text: str) -> list[int]:
    """Numbers of listeners from a list such as "1,4".

    Raises:
        InvalidRequestError: it is something else.
    """
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(1 <= level <= MAX_LEVEL for level in levels):
        raise InvalidRequestError(
            f"--concurrency is a list of numbers from 1 to {MAX_LEVEL}, for example 1,4.", param="concurrency"
        )
    return levels


def read_texts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        InvalidRequestError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidRequestError(f"--text-file {str(path)!r} cannot be read: {reason}.", param="text_file") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InvalidRequestError(f"--text-file {str(path)!r} has no text in it.", param="text_file")
    return texts


def request_count(texts: list[str], level: int) -> int:
    """How many requests a level makes: every text at least once."""
    return max(len(texts), REQUESTS_PER_LISTENER * level)


async def run(
    engine: Engine,
    levels: list[int],
    texts: list[str],
    voice: str | None = None,
    recording: bytes | None = None,
    prompt_text: str = "",
    on_request: Callable[[], None] = lambda: None,
) -> dict[str, object]:
    """Measure each level in turn, streaming.

    Args:
        voice: id of the voice to use; without it and without `recording`, a made-up sound takes its place.
        recording: a voice prompt, with `prompt_text` said in it.
        on_request: called after every request.

    Returns:
        model, device, and results: a dict a level with concurrency, requests, errors, audio_seconds, wall_seconds,
        audio_per_second (of all listeners together), ttfa_p50, ttfa_p95 (seconds), rtf_p50.
    """
    options: dict[str, object] = {"voice": voice}
    if voice is None:
        mode = "zero_shot" if recording is not None and prompt_text else "cross_lingual"
        options = {"prompt": await engine.make_prompt(recording or _made_up_recording(), prompt_text), "mode": mode}
    results = []
    for level in levels:
        numbers = iter(range(request_count(texts, level)))
        results.append(await _measure(engine, level, numbers, texts, options, on_request))
    return {"model": engine.model.name, "device": str(engine.model.device), "results": results}


async def _measure(
    engine: Engine,
    level: int,
    numbers: Iterator[int],
    texts: list[str],
    options: dict[str, object],
    on_request: Callable[[], None],
) -> dict[str, object]:
    done: list[Synthesis] = []
    errors: list[CosyError] = []

    async def listener() -> None:
        for number in numbers:
            request = SynthesisRequest(texts[number % len(texts)], seed=number, stream=True, **options)
            try:
                synthesis = engine.synthesize(request)
                async for _ in synthesis:
                    pass
                done.append(synthesis)
            except CosyError as error:
                errors.append(error)
            on_request()

    started = time.perf_counter()
    await asyncio.gather(*(listener() for _ in range(level)))
    wall = time.perf_counter() - started
    if not done:
        raise errors[0]
    heard = [synthesis.timings for synthesis in done]
    audio = sum(timings.audio_seconds for timings in heard)
    first = [timings.first_audio for timings in heard]
    return {
        "concurrency": level,
        "requests": len(done) + len(errors),
        "errors": len(errors),
        "audio_seconds": round(audio, 3),
        "wall_seconds": round(wall, 3),
        "audio_per_second": round(audio / wall, 3),
        "ttfa_p50": _percentile(first, 50),
        "ttfa_p95": _percentile(first, 95),
        "rtf_p50": _percentile([timings.rtf for timings in heard], 50),
    }


def _percentile(values: list[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 4)


def _made_up_recording(seconds: float = 5.0, rate: int = 16000) -> bytes:
    """A hum with the pitch range and the rhythm of speech: enough to measure with, nothing to listen to."""
    moment = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.7 * moment)) / rate
    sound = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 20))
    return wav_bytes((0.2 * sound * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * moment))).astype(np.float32), rate)
