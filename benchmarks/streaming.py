"""What a stream costs: `python -m benchmarks.streaming [--full-size --version 2] [--json F] [--plot F]`.

Side by side with the public code's way of recomputing all that came before for each chunk, with the same networks and
the same speech LM in the same process: what a chunk costs late in a long stream, how long a listener waits for the
first sound, and what happens when many listen at once. Then, of the incremental path alone, what a smaller first chunk
changes and where the time goes. Every request has as many speech tokens. A measurement that takes longer than the
limit is cut, and the output says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.chunks import CONSTANT_HOP, measure_chunks
from benchmarks.engines import (
    SPOKEN,
    TOKENS_PER_SECOND,
    Backend,
    FixedLength,
    recording,
    running_engine,
    running_speech_lm,
)
from benchmarks.full_size import random_model
from benchmarks.listeners import (
    measure_closed_loop,
    measure_first_audio,
    measure_first_hops,
    measure_long_stream,
    measure_poisson,
)
from benchmarks.plots import plot
from benchmarks.stages import measure_stages
from benchmarks.tables import remarks, show
from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.config import Settings, choose_device
from cosy_engine.token2wav.static_encoder import use_static_encoder
from cosy_engine.token2wav.static_estimator import use_graphs

Number = TypeVar("Number", int, float)
FIRST_HOPS = (8, 12, 15, 22, 47)  # 8 and 15 are the defaults on a GPU of CosyVoice3 and 2
BATCH = 32  # on a GPU
MEASURED_TOGETHER = 16  # streams whose states fit onto a GPU in float32, too

console = Console(stderr=True)


def main(
    model_dir: Annotated[str | None, typer.Option(help="default: the model that ships with the project")] = None,
    full_size: Annotated[bool, typer.Option("--full-size", help="random weights of the published sizes")] = False,
    version: Annotated[int, typer.Option(min=2, max=3, help="2 or 3, for --full-size")] = 2,
    device: Annotated[str, typer.Option()] = "auto",
    fp16: Annotated[bool, typer.Option("--fp16", help="speech LM and flow in half precision")] = False,
    lm: Annotated[Backend, typer.Option(help="what the speech LM runs on")] = "torch",
    tokens: Annotated[int, typer.Option(min=50, help="speech tokens of each request, 25 a second")] = 250,
    seconds: Annotated[int, typer.Option(min=5, help="length of the long stream")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="repetitions of what one listener hears")] = 5,
    concurrency: Annotated[str, typer.Option(help="numbers of listeners")] = "1,4",
    recompute_concurrency: Annotated[str, typer.Option(help="the same when everything is recomputed")] = "1,4",
    rates: Annotated[str, typer.Option(help="requests a second that arrive at random, such as 2,8")] = "",
    limit: Annotated[float, typer.Option(help="seconds that one measurement may take")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write the plot to this PNG")] = None,
) -> None:
    """Measure streaming, side by side with recomputing everything for each chunk."""
    where, dtype = choose_device(device), torch.float16 if fp16 else torch.float32
    on_gpu = where.type == "cuda"
    if fp16 and not on_gpu:
        raise typer.BadParameter("half precision needs a GPU", param_hint="--fp16")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("a plot needs matplotlib: pip install matplotlib", param_hint="--plot")
    levels = {"incremental": _numbers(concurrency, int), "recompute": _numbers(recompute_concurrency, int)}
    settings = Settings(
        device=device,
        fp16=fp16,
        concurrency=max(1, *levels["incremental"], *levels["recompute"]),
        max_queue=10_000,
        batch=BATCH if on_gpu else 1,
    )
    report: dict[str, Any] = {}

    @contextmanager
    def part(what: str) -> Iterator[None]:
        began = time.perf_counter()
        with console.status(what):
            yield
        console.log(f"{what}: {time.perf_counter() - began:.1f} s")
        if json_file is not None:  # what is there is kept if a later part fails
            json_file.write_text(json.dumps(report, indent=1), encoding="utf-8")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with part("model"):
            if full_size:
                model = random_model(version, folder / "model", where, dtype)
            else:
                model = load_model(model_dir or default_model_dir(), where, dtype)
            if on_gpu:
                use_graphs(model.flow.decoder)
                use_static_encoder(model.flow, BATCH)
        with part("speech LM"):
            speech_lm = FixedLength(stack.enter_context(running_speech_lm(model, lm)), tokens)
        report |= _circumstances(model, full_size, lm, tokens)
        for path in ("incremental", "recompute"):
            figures = report[path] = {"listeners": [], "arrivals": []}
            with part(f"{path}: a long stream"):
                figures["chunks"] = measure_chunks(model, path, seconds, rounds, limit)
            own = settings.model_copy(update={"upstream_exact": path == "recompute", "voices_dir": folder / path})
            with running_engine(model, speech_lm, own) as engine:
                voice = asyncio.run(engine.enroll("benchmark", recording(0), SPOKEN)).id
                with part(f"{path}: first audio"):
                    figures["first_audio"] = asyncio.run(measure_first_audio(engine, voice, rounds, limit))
                if path == "incremental":
                    with part("a long stream of the engine"):
                        speech_lm.tokens = seconds * TOKENS_PER_SECOND
                        long = measure_long_stream(engine, voice, CONSTANT_HOP, rounds, limit)
                        figures["heard"] = asyncio.run(long)
                        speech_lm.tokens = tokens
                    with part("first hops"):
                        hops = measure_first_hops(engine, voice, FIRST_HOPS, rounds, limit)
                        figures["first_hops"] = asyncio.run(hops)
                for level in levels[path]:
                    with part(f"{path}: {level} at once"):
                        crowd = measure_closed_loop(engine, voice, level, max(3 * level, 6), limit)
                        figures["listeners"].append(asyncio.run(crowd))
                for rate in _numbers(rates, float):
                    with part(f"{path}: {rate:g} requests a second"):
                        figures["arrivals"].append(asyncio.run(measure_poisson(engine, voice, rate, limit)))
            if path == "incremental":
                streams = (1, MEASURED_TOGETHER) if on_gpu else (1,)
                with part("parts of a chunk"):
                    report["stages"] = measure_stages(model, speech_lm, streams, rounds)
    show(report, Console(width=max(100, console.width)))
    if plot_file is not None:
        plot(report, plot_file)
    if list(remarks(report, "failed")):
        raise typer.Exit(1)


def _circumstances(model: CosyVoiceModel, full_size: bool, lm: Backend, tokens: int) -> dict[str, Any]:
    on_gpu = model.device.type == "cuda"
    return {
        "model": f"{model.name}, random weights of the published sizes" if full_size else model.name,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "speech_lm": lm,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_a_request": tokens,
    }


def _numbers(text: str, kind: type[Number]) -> list[Number]:
    return [kind(number) for number in text.split(",") if number]


if __name__ == "__main__":
    logging.getLogger("cosy_engine").setLevel(logging.ERROR)
    typer.run(main)
