"""The speech LM on vLLM and on PyTorch in one run: `python -m benchmarks.speech_lm [--published] [--json F]`.

For each number of requests at once: speech tokens a second of all of them together, and the time to the 28th token,
after which the first sound is made, of the median and of the slowest request; of three rounds, the one in the middle.
"vllm, plain" is vLLM without repetition-aware sampling, with its own draw from all ids, to show what ours costs.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from cosy_engine.checkpoint.default import default_model_dir
from cosy_engine.checkpoint.load import load_speech_lm
from cosy_engine.config import VllmSettings, choose_device, vllm_options
from cosy_engine.modules.qwen2_lm import CosyVoice3LM, Qwen2Encoder, Qwen2LM
from cosy_engine.speech_lm.base import SpeechLM, SpeechLMRequest
from cosy_engine.speech_lm.decoding import SpeechCodeLM
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from cosy_engine.speech_lm.vllm_engine import Generation, VllmEngine
from cosy_engine.speech_lm.vllm_export import write_export
from cosy_engine.speech_lm.vllm_lm import VllmSpeechLM

if TYPE_CHECKING:
    from vllm import SamplingParams

FIRST_SOUND = 28  # tokens: a hop of 25 and 3 to look ahead
PROMPT_TEXT, TEXT, PROMPT_SPEECH = 15, 50, 125  # tokens; five seconds of recording
PUBLISHED_SIZES = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
ROUNDS = 3
PLAIN = {"logits_processors": None, "worker_extension_cls": "benchmarks.plain_worker.PlainWorker"}
Row = dict[str, str | int | float]

console = Console(stderr=True)


def main(
    model_dir: Annotated[Path | None, typer.Option(help="A local model directory; default: the shipped one.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Random weights in the published models' sizes instead.")
    ] = False,
    version: Annotated[int, typer.Option(min=2, max=3, help="2 or 3, for --published.")] = 2,
    at_once: Annotated[str, typer.Option(help="Numbers of requests.")] = "1,4,16,64",
    tokens: Annotated[int, typer.Option(min=FIRST_SOUND, help="Speech tokens a request.")] = 250,
    device: Annotated[str, typer.Option(help="Of PyTorch; vLLM's depends on its build.")] = "auto",
    fp16: Annotated[bool, typer.Option("--fp16", help="PyTorch in half precision.")] = False,
    vllm_args: Annotated[str, typer.Option(metavar="JSON", help="Arguments of vLLM's engine.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Give up after so many seconds and show what hangs.")] = 900,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Measure and print a table."""
    faulthandler.dump_traceback_later(limit, exit=True)
    levels = [int(level) for level in at_once.split(",")]
    settings: VllmSettings = vllm_options(True, vllm_args)["vllm"]
    where = choose_device(device)
    lm = random_lm(version) if published else load_speech_lm(model_dir or default_model_dir())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as export:
        write_export(lm, Path(export))

        def on_vllm(args: dict[str, Any] | None = None) -> SpeechLM:
            return VllmSpeechLM(lm, Path(export), settings.model_copy(update={"args": settings.args | (args or {})}))

        def on_torch() -> SpeechLM:
            return TorchSpeechLM(lm.to(dtype=torch.float16 if fp16 else torch.float32), where)

        for name, start in {"vllm": on_vllm, "vllm, plain": lambda: on_vllm(PLAIN), "torch": on_torch}.items():
            began = time.perf_counter()
            with plain_sampling(name == "vllm, plain"), running(start()) as speech_lm:
                console.log(f"{name}: started in {time.perf_counter() - began:.0f} s")
                for level in levels:
                    # PyTorch has one request at a time in a batch: that many more tokens would say nothing new.
                    count = tokens if name != "torch" else max(FIRST_SOUND, tokens // level)
                    rows.append({"backend": name, "at_once": level} | measure(speech_lm, lm, level, count))
                    console.log(str(rows[-1]))
            if as_json:
                as_json.write_text(json.dumps(report(rows), indent=1), encoding="utf-8")
    show(rows)


@contextmanager
def plain_sampling(wanted: bool) -> Iterator[None]:
    """vLLM draws from all ids that do not end the speech, as many tokens as there may be."""

    def sampling(engine: VllmEngine, generation: Generation) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=1.0,
            min_tokens=generation.most,
            max_tokens=generation.most,
            stop_token_ids=generation.stop_ids,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    with mock.patch.object(VllmEngine, "_sampling", sampling) if wanted else nullcontext():
        yield


def random_lm(version: int) -> SpeechCodeLM:
    """A speech LM of the published sizes with random weights, on the CPU."""
    torch.manual_seed(0)
    width = PUBLISHED_SIZES["hidden_size"]
    return (Qwen2LM if version == 2 else CosyVoice3LM)(width, width, 6561, Qwen2Encoder(PUBLISHED_SIZES)).eval()


@contextmanager
def running(speech_lm: SpeechLM) -> Iterator[SpeechLM]:
    try:
        yield speech_lm
    finally:
        speech_lm.close()


def measure(speech_lm: SpeechLM, lm: SpeechCodeLM, level: int, tokens: int) -> Row:
    """The middle one of some rounds, after a short one: the first use of a batch size is slow."""
    asyncio.run(one_round(speech_lm, lm, level, FIRST_SOUND, seed=0))
    rounds = [asyncio.run(one_round(speech_lm, lm, level, tokens, seed=seed)) for seed in range(1, ROUNDS + 1)]
    return sorted(rounds, key=lambda row: row["tokens_per_second"])[ROUNDS // 2]


async def one_round(speech_lm: SpeechLM, lm: SpeechCodeLM, level: int, tokens: int, seed: int) -> Row:
    """`level` requests that start together, each of `tokens` speech tokens."""
    generator = torch.Generator().manual_seed(level * 1000 + seed)
    text_vocabulary = lm.llm.model.model.embed_tokens.num_embeddings

    def ids(count: int, below: int) -> list[int]:
        return torch.randint(below, (count,), generator=generator).tolist()

    async def listen(codes: AsyncIterator[int]) -> list[float]:
        return [time.perf_counter() - started async for _ in codes]

    ratio = tokens / TEXT
    requests = [
        SpeechLMRequest(
            ids(TEXT, text_vocabulary),
            ids(PROMPT_TEXT, text_vocabulary),
            ids(PROMPT_SPEECH, lm.speech_token_size),
            seed=number,
            min_ratio=ratio,
            max_ratio=ratio,
        )
        for number in range(level)
    ]
    started = time.perf_counter()
    arrivals = await asyncio.gather(*(listen(speech_lm.generate(request)) for request in requests))
    seconds = time.perf_counter() - started
    firsts = [moments[FIRST_SOUND - 1] for moments in arrivals]
    return {
        "tokens": tokens,
        "tokens_per_second": round(sum(map(len, arrivals)) / seconds, 1),
        "median_28th_ms": round(1000 * statistics.median(firsts), 1),
        "slowest_28th_ms": round(1000 * max(firsts), 1),
    }


def report(rows: list[Row]) -> dict[str, object]:
    """All figures, and what share of its tokens a second vLLM loses to our sampling, for each number of requests."""
    speed = {(row["backend"], row["at_once"]): row["tokens_per_second"] for row in rows}
    loss = {
        level: round(1 - ours / speed["vllm, plain", level], 3)
        for (name, level), ours in speed.items()
        if name == "vllm" and ("vllm, plain", level) in speed
    }
    return {"torch": torch.__version__, "results": rows, "share_lost_to_sampling": loss}


def show(rows: list[Row]) -> None:
    table = Table(*rows[0], title=f"{os.cpu_count()} cores, torch {torch.__version__}", box=None)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    Console().print("lost to our sampling:", report(rows)["share_lost_to_sampling"])


if __name__ == "__main__":
    typer.run(main)
