"""Are the GPU paths right, and what does a step take? `python -m benchmarks.gpu_check --json FILE`, about 4 minutes.

Each figure is printed and written as soon as there is one. A part that fails is reported and the rest goes on; the
exit status is 1 if any failed or gave something else than it should. `--dry` runs all that a CPU can at tiny sizes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recorded

from benchmarks.engines import SPOKEN, TEXT, recording
from benchmarks.full_size import random_flow
from benchmarks.speech_lm import random_lm
from cosy_engine.checkpoint.load import load_model
from cosy_engine.config import HopSettings, Settings
from cosy_engine.engine import Engine, SynthesisRequest
from cosy_engine.modules.attention import PagedPast
from cosy_engine.modules.flow_matching import EstimatorInputs
from cosy_engine.modules.qwen2_lm import KVCache
from cosy_engine.modules.streaming import fork_state, init_state
from cosy_engine.speech_lm.graphed_step import GraphedStep
from cosy_engine.token2wav.hops import PACES
from cosy_engine.token2wav.static_encoder import StaticEncoder, use_static_encoder
from cosy_engine.token2wav.static_estimator import StaticEstimator, use_graphs
from cosy_engine.token2wav.static_vocoder import StaticVocoder
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import Encode, EulerSteps
from tests.modules.small_flow import small_flow
from tests.speech_lm.small_lm import small_lm
from tests.standin import write_standin
from tests.token2wav.test_session import random_prompt, random_tokens, run

Figures = Iterator[tuple[str, Any]]
SOUND = 0.02  # relative difference of sounds in float32: the sine source's phase amplifies the rounding of the mel
LM_STEP = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
STEPS = [(1, 50, 256), (1, 50, 1000), (1, 50, 3000), (1, 100, 256), (8, 50, 256), (8, 50, 3000), (32, 50, 256)]
STEPS += [(32, 50, 1000), (32, 200, 500)]  # streams, frames, past


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="on the CPU at tiny sizes")] = False,
    only: Annotated[str, typer.Option(help="the parts to run, such as lm,streams; default: all")] = "",
) -> None:
    """Run all parts."""
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU here; --dry runs on the CPU")
    if only and not set(only.split(",")) <= set(PARTS):
        raise typer.BadParameter(f"choose from {', '.join(PARTS)}", param_hint="--only")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # or nothing is like the CPU's
    device = torch.device("cpu" if dry else "cuda:0")
    found = {"device": "cpu" if dry else torch.cuda.get_device_name(device), "torch": torch.__version__, "wrong": []}
    for figure, value in _figures(device, only.split(",") if only else list(PARTS)):
        found[figure] = value
        if isinstance(value, dict) and value.get("right") is False:
            found["wrong"].append(figure)
        print(f"{figure}: {value}", flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    print("wrong:", ", ".join(found["wrong"]) or "nothing")
    if found["wrong"]:
        raise typer.Exit(1)


def _figures(device: torch.device, names: list[str]) -> Figures:
    """Of all these parts, with the seconds they took and the failures of those that have one."""
    for name in names:
        began = time.perf_counter()
        try:
            for figure, value in PARTS[name](device):
                yield f"{name}, {figure}", value
        except Exception as error:
            traceback.print_exc()
            yield f"{name}, failed", {"right": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()  # buffers and the steps on them hold each other
        yield f"{name}, s", round(time.perf_counter() - began, 1)


def kernels(device: torch.device) -> Figures:
    """Both Triton kernels against PyTorch."""
    if device.type != "cuda":
        yield "skipped", "they need a GPU"
        return
    from cosy_engine.speech_lm import vllm_kernel
    from cosy_engine.token2wav.paged_attention import agrees

    for heads in (8, 16):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            yield f"attention, {heads} heads, {dtype}", {"right": agrees(device, dtype, heads, 64)}
    for size in (6564, 6761):
        yield f"sampling, {size} ids", {"right": vllm_kernel.agrees(device, size)}


@torch.inference_mode()
def lm(device: torch.device) -> Figures:
    """The speech LM's step in graphs against the one without."""
    gpu = device.type == "cuda"
    for dtype, tolerance in LM_STEP.items():
        with torch.device(device):
            encoder = (random_lm(2) if gpu else small_lm(2)).llm.to(dtype).eval()
        graphed, caches = GraphedStep(encoder), (KVCache(), KVCache())
        width, worst = len(encoder.model.model.norm.weight), 0.0
        prompt = torch.randn(1, 190, width, device=device, dtype=dtype)
        for cache in caches:
            encoder.extend(prompt, cache)
        for _ in range(80 if gpu else 4):  # over the border from one graph to the next
            new = torch.randn(1, 1, width, device=device, dtype=dtype)
            ours, theirs = graphed(new, caches[0]).float(), encoder.extend(new, caches[1]).float()
            difference = float((ours - theirs).norm() / theirs.norm())
            worst = difference if difference != difference else max(worst, difference)
        yield (
            f"{dtype}",
            {"right": worst < tolerance, "worst": worst}
            | {
                "ms in a graph": _ms(device, lambda made=graphed, new=new, cache=caches[0]: made(new, cache)),
                "ms without": _ms(device, lambda made=encoder, new=new, cache=caches[1]: made.extend(new, cache)),
            },
        )


@torch.inference_mode()
def streams(device: torch.device) -> Figures:
    """A stream of a small model: encoder, estimator and vocoder in graphs, with each kind of past, against neither."""
    gpu = device.type == "cuda"
    prompt, tokens, memory = random_prompt(77), random_tokens(320 if gpu else 40), {"voice_cache": 2**30}
    for version in (2, 3):
        model = load_model(write_standin(Path(tempfile.mkdtemp()) / "m", f"cosyvoice{version}"), device)

        def sound(vocoder: nn.Module, flow: nn.Module = model.flow) -> Tensor:
            made = Token2Wav(flow, vocoder, stream_memory=2**32, **memory)
            return torch.cat(run(made.session(prompt, HopSettings(), stream=True, seed=7), tokens)).cpu()

        own, plain, vocoder = model.flow.decoder.estimator, sound(model.hift), StaticVocoder(model.hift, graphs=gpu)
        if version == 2:
            model.flow.encoder = StaticEncoder(model.flow.encoder, positions=4 * 1024, graphs=gpu)
        for kind in _kinds(own):
            model.flow.decoder.estimator = StaticEstimator(own, steps=10, memory=2**30, graphs=gpu, past=kind)
            for use in ("first", "again"):  # a shape's second use is the first replay of its graph
                yield f"{version}, {kind.__name__}, {use}", _same(sound(vocoder), plain, SOUND)


def engine(device: torch.device) -> Figures:
    """The whole engine: requests together against alone; float32 on this device against the CPU."""
    for version in (2, 3):
        directory = write_standin(Path(tempfile.mkdtemp()) / "model", f"cosyvoice{version}")
        with mock.patch.dict(PACES, cpu=PACES[device.type]):  # the same chunks, and so the same masks
            on_cpu, _ = _spoken(directory, "cpu", together=0)
        alone, together = _spoken(directory, str(device), together=12 if device.type == "cuda" else 2)
        for seed, (ours, theirs) in enumerate(zip(alone, on_cpu, strict=True)):
            yield f"{version}, seed {seed}, to the CPU", _same(ours, theirs, SOUND)
        for index, ours in enumerate(together):
            yield f"{version}, number {index} together, to alone", _same(ours, alone[index % len(alone)], SOUND)


def _spoken(directory: Path, device: str, together: int) -> tuple[list[Tensor], list[Tensor]]:
    """Streams of two seeds alone, then so many at once."""
    settings = Settings(device=device, concurrency=16, voices_dir=Path(tempfile.mkdtemp()))
    made = Engine.load(directory, settings)

    async def listen(seed: int) -> Tensor:
        request = SynthesisRequest(TEXT, voice="v", seed=seed, stream=True)
        return torch.from_numpy(np.concatenate([chunk.samples async for chunk in made.synthesize(request)]))

    async def speak() -> tuple[list[Tensor], list[Tensor]]:
        await made.enroll("v", recording(0), SPOKEN)
        return [await listen(seed) for seed in (0, 1)], await asyncio.gather(*(listen(i % 2) for i in range(together)))

    try:
        return asyncio.run(asyncio.wait_for(speak(), 100))
    finally:
        made.close()


@torch.inference_mode()
def flow(device: torch.device) -> Figures:
    """What the engine's start, its steps and its batches take, at the published size in half precision."""
    gpu = device.type == "cuda"
    for version in (2, 3):
        made = _flow(version, device)
        yield f"{version}, start", _start(made, device)
        yield f"{version}, first chunk, ms", _batches(made, device)
        yield f"{version}, one step's kernels", _profile(made.decoder.estimator, device)
        own = made.decoder.estimator.estimator
        for kind in _kinds(own):
            made.decoder.estimator = estimator = None  # its pool
            estimator = StaticEstimator(own, steps=1, memory=2**35 if gpu else 2**28, graphs=gpu, past=kind)
            for shape in STEPS if gpu else STEPS[:1]:
                yield f"{version}, {kind.__name__}, streams, frames, past {shape}", _step(estimator, device, *shape)


def _flow(version: int, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        return small_flow(f"cosyvoice{version}")
    torch.manual_seed(0)
    with torch.device(device):
        made = random_flow(version)
    for parameter in made.parameters():  # buffers are tables and keep their precision
        parameter.data = parameter.data.half()
    return made.to(device).eval().requires_grad_(False)


def _start(flow: nn.Module, device: torch.device) -> dict[str, Any]:
    began, gpu = _now(device), device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        use_graphs(flow.decoder)
        use_static_encoder(flow, 32)
    else:
        flow.decoder.estimator = StaticEstimator(flow.decoder.estimator, steps=10, memory=2**28, graphs=False)
    estimator = flow.decoder.estimator
    estimator.warm_up(32 if gpu else 1)
    if isinstance(getattr(flow, "encoder", None), StaticEncoder):
        flow.encoder.warm_up(32)
    seconds = round(_now(device) - began, 1)
    memory = (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) if gpu else ()
    with_kernel = not gpu or estimator._past is not PagedPast
    made = {"s": seconds, "right": with_kernel and bool(torch.isfinite(estimator.pool.pages[0]).all())}
    made |= {"past": estimator._past.__name__, "shapes": len(estimator._steps)}
    return made | {"GiB, most and now": [round(size / 2**30, 1) for size in memory]}


def _batches(flow: nn.Module, device: torch.device) -> dict[int, dict[str, float]]:
    """The first chunk of several streams of one warm voice: encoder, ten Euler steps."""
    like = next(flow.parameters())
    cond, spks = like.new_zeros(1, 80, 30), like.new_zeros(1, 80)
    tokens, prompt = (torch.zeros(1, count, dtype=torch.int32, device=device) for count in (18, 125))
    voice, made = init_state(flow, 1, device, like.dtype), {}
    flow.decoder.solve(flow.begin_chunk(prompt, like.new_zeros(1, 80, 244), spks, voice, finalize=False))
    for count in (1, 8, 32) if device.type == "cuda" else (2,):
        rows = []
        for _ in range(4):
            states = [fork_state(voice) for _ in range(count)]
            began = _now(device)
            works = [Encode(flow, tokens, state, finalize=False) for state in states]
            Encode.run(works)
            encoded = _now(device)
            pairs = zip(works, states, strict=True)
            begun = [flow.begin_chunk(tokens, cond, spks, own, finalize=False, mu=work.mu) for work, own in pairs]
            steps = [EulerSteps(flow.decoder, trajectory) for trajectory in begun]
            while not steps[0].done:
                EulerSteps.run(steps)
            rows.append((encoded - began, _now(device) - encoded))
        medians = (1000 * np.median(rows[1:], axis=0)).round(2).tolist()
        made[count] = dict(zip(("encoder", "ten steps"), medians, strict=True))
    return made


def _step(estimator: StaticEstimator, device: torch.device, *shape: int) -> dict[str, Any]:
    """Milliseconds of a graph's replay alone, with what is copied around it, and what the host takes of that."""
    first = _likes(estimator, *shape)
    estimator.velocities(first)
    key, (_, step) = next(reversed(estimator._steps.items()))
    times = []
    for _ in range(5):
        for own in first:  # as in all steps of a chunk but its first
            own.state["stream"].length = shape[2]
        began = _now(device)
        estimator.velocities(first)
        times.append((time.perf_counter() - began, _now(device) - began))
    host, whole = (1000 * np.median(times, axis=0)).round(2).tolist()
    return {"run at": key, "replay": _ms(device, step), "with copies": whole, "host": host}


def _profile(estimator: StaticEstimator, device: torch.device) -> dict[str, Any]:
    """Where a step of one stream goes."""
    estimator.velocities(_likes(estimator, 1, 50, 256))
    step = next(run for key, (_, run) in estimator._steps.items() if key[:2] == (1, 50))
    with recorded(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as made:
        step()
        _now(device)
    took: dict[str, list[float]] = defaultdict(list)
    for event in made.events():
        if device.type != "cuda" or str(event.device_type).endswith("CUDA"):
            took[event.name[:90]].append(event.time_range.elapsed_us())
    slowest = sorted(took.items(), key=lambda item: -sum(item[1]))[:20]
    return {"count": sum(map(len, took.values())), "us": round(sum(map(sum, took.values())), 1)} | {
        name: f"{sum(times):.1f} us, {len(times)}x" for name, times in slowest
    }


def _likes(estimator: StaticEstimator, streams: int, frames: int, past: int) -> list[EstimatorInputs]:
    weight = next(estimator.estimator.parameters())
    t = estimator.time_features(torch.zeros(1, device=weight.device)).expand(2, -1)
    mels = [torch.randn(2, 80, frames, device=weight.device).to(weight.dtype) for _ in range(streams)]
    spks = weight.new_zeros(2, 80)
    inputs = []
    for mel in mels:
        stream = estimator.new_stream(1)
        stream.reserve(past + frames)
        stream.length = past
        inputs.append(EstimatorInputs(mel, None, mel.clone(), t, spks, mel, {"stream": stream, "step": 0}))
    return inputs


def _kinds(estimator: nn.Module) -> list[type[PagedPast]]:
    """Without the kernel, and with it where there is a GPU."""
    if not next(estimator.parameters()).is_cuda:
        return [PagedPast]
    from cosy_engine.token2wav.paged_attention import KernelPast

    return [PagedPast, KernelPast]


def _same(ours: Tensor, theirs: Tensor, tolerance: float) -> dict[str, Any]:
    if ours.shape != theirs.shape:
        return {"right": False, "shapes": [list(ours.shape), list(theirs.shape)]}
    difference, theirs = ours.double() - theirs.double(), theirs.double()
    relative = float(difference.norm() / theirs.norm())
    return {"right": relative < tolerance, "relative": relative, "largest": float(difference.abs().max())}


def _ms(device: torch.device, function: Callable[[], object]) -> float:
    times = []
    for _ in range(11):
        began = _now(device)
        function()
        times.append(1000 * (_now(device) - began))
    return round(statistics.median(times), 3)


def _now(device: torch.device) -> float:
    """With the GPU done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS = {"kernels": kernels, "lm": lm, "streams": streams, "engine": engine, "flow": flow}


if __name__ == "__main__":
    typer.run(main)
