"""What a stream costs: `python -m benchmarks.streaming [--model-dir D] [--json F] [--plot F]`.

Three questions, each answered for the incremental path and, in the same process, for the public code's recompute path:
what does a chunk cost late in a long stream, how long does a listener wait for the first sound with a new recording
and with a saved voice, and what happens when many listen at once. Figures are medians in seconds; the ratios are what
to compare between machines.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from cosy_engine.audio.encode import wav_bytes
from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.config import HopSettings, Settings, choose_device
from cosy_engine.engine import AudioChunk, Engine, SynthesisRequest
from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import state_bytes
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import complete

TOKENS_PER_SECOND = 25
PROMPT_SECONDS = 5
START_BUFFER = 0.3  # seconds a player holds back before it starts
TEXT = "The first sound of this sentence should reach the listener before the last word of it has been thought of."
CONSTANT_HOP = HopSettings(token_hop_len_first=47, token_max_hop_len=25)

console = Console(stderr=True)


def made_up_prompt(seconds: float, model: CosyVoiceModel) -> Prompt:
    """Random codes and mel: a voice for measuring, not for listening."""
    generator = torch.Generator().manual_seed(0)
    tokens = int(seconds * TOKENS_PER_SECOND)
    return Prompt(
        text="",
        text_token=torch.zeros(0, dtype=torch.int32),
        speech_token=torch.randint(0, model.flow.vocab_size, (tokens,), generator=generator, dtype=torch.int32),
        speech_feat=torch.randn(2 * tokens, model.mel.num_mels, generator=generator),
        embedding=torch.randn(model.flow.spk_embed_affine_layer.in_features, generator=generator),
    )


def recording(seed: int) -> bytes:
    """Five seconds of a humming voice, another one for each seed."""
    time_axis = np.arange(16000 * PROMPT_SECONDS) / 16000
    pitch = 120 + 7 * seed + 20 * np.sin(2 * np.pi * 0.7 * time_axis)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_axis))
    return wav_bytes((0.2 * wave).astype(np.float32), 16000)


@torch.inference_mode()
def chunk_seconds(session: Session, tokens: list[int], device: torch.device) -> list[float]:
    """How long each chunk of a stream takes; all tokens are there from the start."""
    session.push(tokens)
    session.finish()
    seconds = []
    while not session.done:
        started = time.perf_counter()
        complete(session.chunk())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure_chunks(model: CosyVoiceModel, seconds: int, rounds: int) -> dict[str, Any]:
    """Seconds of each chunk of a long stream at a constant hop of 25 tokens, and what the stream holds at its end."""
    prompt = made_up_prompt(PROMPT_SECONDS, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.flow.vocab_size, (seconds * TOKENS_PER_SECOND,), generator=generator).tolist()
    paths = {}
    for name in ("incremental", "recompute"):
        token2wav = Token2Wav(model.flow, model.hift, upstream_exact=name == "recompute")
        runs = []
        for number in range(rounds + 1):  # the first one warms up
            session = token2wav.session(prompt, CONSTANT_HOP, stream=True, seed=0)
            if number == 0:
                chunk_seconds(session, tokens[: 4 * TOKENS_PER_SECOND], model.device)
            else:
                runs.append(chunk_seconds(session, tokens, model.device))
        chunks = [statistics.median(column) for column in zip(*runs, strict=True)]
        # The last chunk has what is left, so the last whole one stands for the end of the stream.
        paths[name] = {"chunks": chunks, "last_over_third": chunks[-2] / chunks[2], "total": sum(chunks)}
        if name == "incremental":
            held = state_bytes(session._flow_state) + state_bytes(session._vocoder_state)
            paths[name]["state_bytes_per_second"] = held / (seconds + PROMPT_SECONDS)
    return {"stream_seconds": seconds, **paths}


async def first_audio(engine: Engine, request: SynthesisRequest) -> float:
    """Seconds from the request to the first sound; the rest is cancelled."""
    synthesis = engine.synthesize(request)
    async for _ in synthesis:
        break
    await synthesis.cancel()
    return synthesis.timings.first_audio


async def measure_first_audio(engine: Engine, rounds: int) -> dict[str, float]:
    """First audio with a recording that is new to the engine, prompt computation included, and with a saved voice."""
    voice = await engine.enroll("benchmark", recording(0), "what is said", replace=True)
    await first_audio(engine, SynthesisRequest(TEXT, voice=voice.id, seed=0))
    cold, warm = [], []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        prompt = await engine.make_prompt(recording(number), "what is said")
        made = time.perf_counter() - started
        cold.append(made + await first_audio(engine, SynthesisRequest(TEXT, prompt=prompt, seed=number)))
        warm.append(await first_audio(engine, SynthesisRequest(TEXT, voice=voice.id, seed=number)))
    cold_median, warm_median = statistics.median(cold), statistics.median(warm)
    return {"cold_prompt": cold_median, "warm_voice": warm_median, "warm_over_cold": warm_median / cold_median}


async def count_underruns(chunks: AsyncIterator[AudioChunk]) -> int:
    """How often a player that starts with START_BUFFER seconds in hand runs dry before the stream ends."""
    underruns, arrived, playing_since = 0, 0.0, None
    async for chunk in chunks:
        now = time.perf_counter()
        if playing_since is not None and now - playing_since > arrived:
            underruns += 1
            playing_since = now - arrived
        arrived += len(chunk.samples) / chunk.sample_rate
        if playing_since is None and arrived >= START_BUFFER:
            playing_since = now
    return underruns


async def measure_listeners(engine: Engine, listeners: int, requests: int) -> dict[str, float]:
    """Closed loop: each listener asks again as soon as he has heard everything."""
    numbers = iter(range(requests))
    first, rtf, underruns, audio = [], [], 0, 0.0

    async def listener() -> None:
        nonlocal underruns, audio
        for number in numbers:
            synthesis = engine.synthesize(SynthesisRequest(TEXT, voice="benchmark", seed=number))
            underruns += await count_underruns(aiter(synthesis))
            first.append(synthesis.timings.first_audio)
            rtf.append(synthesis.timings.rtf)
            audio += synthesis.timings.audio_seconds

    started = time.perf_counter()
    await asyncio.gather(*(listener() for _ in range(listeners)))
    wall = time.perf_counter() - started
    return {
        "listeners": listeners,
        "ttfa_p50": float(np.percentile(first, 50)),
        "ttfa_p95": float(np.percentile(first, 95)),
        "rtf_p50": float(np.percentile(rtf, 50)),
        "audio_per_second": audio / wall,
        "underruns": underruns,
    }


async def measure_engine(model_dir: Path, settings: Settings, levels: list[int], rounds: int) -> dict[str, Any]:
    engine = await asyncio.to_thread(Engine.load, model_dir, settings)
    try:
        result: dict[str, Any] = {"first_audio": await measure_first_audio(engine, rounds)}
        result["concurrency"] = [await measure_listeners(engine, level, max(2 * level, 4)) for level in levels]
        return result
    finally:
        engine.close()


def plot(chunks: dict[str, Any], path: Path) -> None:
    """Time of each chunk against its place in the stream, both paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("recompute", "incremental"):
        axes.plot(chunks[name]["chunks"][:-1], label=name)
    axes.set(xlabel="second of speech", ylabel="seconds a chunk takes", title="Cost of a one-second chunk")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(
    model_dir: Annotated[str | None, typer.Option(help="default: the model that ships with the project")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    seconds: Annotated[int, typer.Option(help="length of the long stream")] = 60,
    rounds: Annotated[int, typer.Option(help="repetitions of each measurement")] = 3,
    concurrency: Annotated[str, typer.Option(help="numbers of listeners")] = "1,4",
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write the plot to this PNG")] = None,
) -> None:
    """Measure streaming, side by side with recomputing everything for each chunk."""
    directory = Path(model_dir) if model_dir else default_model_dir()
    levels = [int(level) for level in concurrency.split(",")]
    model = load_model(directory, choose_device(device))
    report: dict[str, Any] = {
        "model": model.name,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    for _ in track(range(1), "A long stream, chunk by chunk", console=console):
        report["chunks"] = measure_chunks(model, seconds, rounds)
    with tempfile.TemporaryDirectory() as folder:
        for name in track(("incremental", "recompute"), "Requests", console=console):
            settings = Settings(
                voices_dir=Path(folder) / name,
                device=device,
                concurrency=max(levels),
                max_queue=max(levels),
                upstream_exact=name == "recompute",
            )
            report[name] = asyncio.run(measure_engine(directory, settings, levels, rounds))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1))
    if plot_file is not None:
        plot(report["chunks"], plot_file)
    report["chunks"] = {
        name: {key: value for key, value in figures.items() if key != "chunks"}
        for name, figures in report["chunks"].items()
        if isinstance(figures, dict)
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
