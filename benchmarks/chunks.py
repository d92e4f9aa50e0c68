"""What each chunk of a long stream costs, and what the stream remembers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engines import PROMPT_SECONDS, TOKENS_PER_SECOND, UNBOUNDED, made_up_prompt, made_up_tokens
from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.streaming import state_bytes
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import complete

CONSTANT_HOP = HopSettings(token_hop_len_first=47, token_max_hop_len=25)
_WARM_UP = 4 * TOKENS_PER_SECOND


def measure_chunks(model: CosyVoiceModel, path: str, seconds: int, rounds: int, limit: float) -> dict[str, Any]:
    """Seconds of each chunk of a stream with a constant hop of 25 tokens, medians of some rounds.

    After `limit` seconds no further round begins, and the first one ends where it is.
    """
    token2wav = Token2Wav(model.flow, model.hift, upstream_exact=path == "recompute", **UNBOUNDED)
    prompt = made_up_prompt(PROMPT_SECONDS, model)
    tokens = made_up_tokens(seconds * TOKENS_PER_SECOND, model, seed=1)

    def session() -> Session:
        return token2wav.session(prompt, CONSTANT_HOP, stream=True, seed=0)

    _chunk_seconds(session(), tokens[:_WARM_UP], model.device, float("inf"))
    deadline = time.perf_counter() + limit
    runs: list[list[float]] = []
    for _ in range(rounds):
        stream = session()
        times = _chunk_seconds(stream, tokens, model.device, deadline)
        if stream.done or not runs:
            runs.append(times)
        if time.perf_counter() > deadline:
            break
    result = {"stream_seconds": seconds} | chunk_figures(runs, rounds, limit, whole=stream.done)
    result["total"] = sum(result["chunks"])
    if path == "incremental":
        held = state_bytes(stream._flow_state) + state_bytes(stream._vocoder_state)
        result["state_bytes_per_second"] = held / stream._fed[-1] * TOKENS_PER_SECOND
    return result


def chunk_figures(runs: Sequence[Sequence[float]], rounds: int, limit: float, *, whole: bool) -> dict[str, Any]:
    """What some rounds of a stream say of its chunks.

    Args:
        runs: seconds of each chunk in each round.
        rounds: how many there were to be, within `limit` seconds.
        whole: the last round was not cut.
    """
    chunks = [statistics.median(column) for column in zip(*runs, strict=True)]
    result: dict[str, Any] = {"rounds": len(runs), "chunks": chunks}
    if len(chunks) > 3:
        # The last chunk has what is left, so the last whole one stands for the end of the stream.
        result["last_over_third"] = chunks[-2] / chunks[2]
    if len(runs) < rounds or not whole:
        result["cut"] = f"stopped after {limit:.0f} s: {len(chunks)} chunks, {len(runs)} of {rounds} rounds"
    return result


@torch.inference_mode()
def _chunk_seconds(session: Session, tokens: list[int], device: torch.device, deadline: float) -> list[float]:
    """How long each chunk of a stream takes; all tokens are there from the start."""
    session.push(tokens)
    session.finish()
    complete(session.prepare())
    seconds = []
    while not session.done and time.perf_counter() < deadline:
        started = time.perf_counter()
        complete(session.chunk()).cpu()
        seconds.append(time.perf_counter() - started)
    return seconds
