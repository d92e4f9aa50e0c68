"""Checks of whole token-to-wave streams in the public code's way."""

from __future__ import annotations

import torch

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.modules.source import draw_public_noise
from cosy_engine.token2wav.upstream_exact import UpstreamSession
from cosy_engine.token2wav.work import complete
from tests.golden.flow import build_flow
from tests.golden.hift import build_hift
from tests.golden.registry import Case, CheckResult, check


@check("cv2_token2wav", "cv3_token2wav")
def check_token2wav(case: Case, result: CheckResult) -> None:
    constructor = case.meta["constructor"]
    flow = build_flow(constructor["flow_model"], case.weights("flow"))
    hift = build_hift(constructor["hift"], case.weights("hift"), case.ins)
    ins, call, recorded = case.ins, case.meta["call"], case.meta["recorded"]
    prompt = Prompt(
        text="",
        text_token=torch.zeros(0, dtype=torch.int32),
        speech_token=ins["prompt_token"][0],
        speech_feat=ins["prompt_feat"][0],
        embedding=ins["embedding"][0],
    )
    hop = {"token_hop_len": 25}
    vocoder_calls = 0

    def draw_noise(samples: int) -> torch.Tensor:
        torch.manual_seed(call["torch_seed_base"] + vocoder_calls)
        return draw_public_noise(samples)

    def session(stream: bool, speed: float = 1.0) -> UpstreamSession:
        opened = UpstreamSession(flow, hift, prompt, hop, HopSettings(), stream, 0, speed, draw_noise)
        opened.push(ins["token"][0].tolist())
        opened.finish()
        return opened

    streamed = session(stream=True)
    for number, plan in enumerate(recorded["plan"]):
        result.equal(f"chunk{number} exists", streamed.ready, True)
        speech = complete(streamed.chunk())
        vocoder_calls += 1
        result.equal(f"chunk{number} samples", len(speech), plan["samples_out"])
        result.close(f"chunk{number}", speech[None], case.outs[f"chunk{number}.tts_speech"])
    result.equal("stream is done", streamed.done, True)
    result.equal("hop after", hop["token_hop_len"], recorded["hop_after"])

    for name, speed in (("nonstream", 1.0), ("nonstream_speed", call["speed"])):
        vocoder_calls = int(case.outs[f"{name}.torch_seed_offset"])
        result.close(name, complete(session(stream=False, speed=speed).chunk())[None], case.outs[f"{name}.tts_speech"])

    second = session(stream=True)
    for plan in recorded["plan_second_request_same_instance"]:
        complete(second.chunk())
        result.equal("second request finalize", second.done, plan["finalize"])
