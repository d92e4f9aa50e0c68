"""Checks of the vocoders: pitch, excitation, decoding, whole calls, the fixed noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosy_engine.modules.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor
from cosy_engine.modules.hift import CausalHiFTGenerator, HiFTGenerator
from cosy_engine.modules.source import (
    BLOCK,
    PUBLIC_BLOCKS,
    draw_public_noise,
    public_generator_state,
    public_uniform_noise,
)
from tests.golden.registry import Case, CheckResult, check


def build_hift(constructor: dict[str, Any], weights: dict[str, Tensor], ins: dict[str, Tensor]) -> HiFTGenerator:
    """The vocoder of a case, with the case's noise if it brings some."""
    causal = "conv_pre_look_right" in constructor["generator"]
    vocoder, predictor = (
        (CausalHiFTGenerator, CausalConvRNNF0Predictor) if causal else (HiFTGenerator, ConvRNNF0Predictor)
    )
    model = vocoder(**constructor["generator"], f0_predictor=predictor(**constructor["f0_predictor"])).eval()
    model.load_state_dict(weights, strict=True)
    if "buf_sine_waves" in ins:
        values = ins["buf_sine_waves"][0]
        model.m_source.noise = lambda start, length, device: values[start : start + length]
    return model


def case_hift(case: Case) -> HiFTGenerator:
    return build_hift(case.meta["constructor"], case.weights("model"), case.ins)


@check("hift_f0")
def check_f0(case: Case, result: CheckResult) -> None:
    result.close("f0", case_hift(case).f0_predictor(case.ins["mel"]), case.outs["f0"])


@check("hift_source")
def check_source(case: Case, result: CheckResult) -> None:
    source, f0, outs = case_hift(case).m_source, case.ins["f0"], case.outs
    torch.manual_seed(case.meta["call"]["torch_seed"])
    noise = draw_public_noise(outs["noise"].shape[1])
    result.close("noise", noise, outs["noise"], atol=0, rtol=0)
    sines, voiced = source.sines(f0)
    result.equal("uv", torch.equal(voiced, outs["uv"].bool()), True)
    result.close("sines", sines, outs["sines"], atol=case.meta["tolerance"]["sines_atol"])
    result.close("s", source(f0, noise=noise), outs["s"])


@check("hift_decode")
def check_decode(case: Case, result: CheckResult) -> None:
    result.close("speech", case_hift(case).decode(case.ins["mel"], case.ins["s"]), case.outs["speech"])


@check("hift_inference")
def check_inference(case: Case, result: CheckResult) -> None:
    model, mel = case_hift(case), case.ins["mel"]
    torch.manual_seed(case.meta["call"]["torch_seed"])
    noise = draw_public_noise(mel.shape[-1] * model.hop)
    speech, s = model.inference(mel, case.ins.get("cache_source"), noise)
    result.close("s", s, case.outs["s"])
    result.close("speech", speech, case.outs["speech"])


@check("chift_decode")
def check_causal_decode(case: Case, result: CheckResult) -> None:
    speech = case_hift(case).decode(case.ins["mel"], case.ins["s"], case.meta["call"]["finalize"])
    result.close("speech", speech, case.outs["speech"])


@check("chift_inference")
def check_causal_inference(case: Case, result: CheckResult) -> None:
    model = case_hift(case)
    for number, step in enumerate(case.meta["call"]["steps"]):
        mel = case.ins["mel"][:, :, : step["frames"]]
        speech, s = model.inference(mel, finalize=step["finalize"])
        f0 = model.f0_predictor(mel, finalize=step["finalize"])
        result.close(f"step{number}.f0", f0, case.outs[f"step{number}.f0"])
        result.close(f"step{number}.s", s, case.outs[f"step{number}.s"])
        result.close(f"step{number}.speech", speech, case.outs[f"step{number}.speech"])


@check("noise_chain")
def check_noise_chain(case: Case, result: CheckResult) -> None:
    outs, cpu = case.outs, torch.device("cpu")
    rows = outs["sine_waves_first_64"].shape[1]
    end = PUBLIC_BLOCKS * BLOCK
    result.close("rand_ini", public_generator_state()[0], outs["rand_ini"])
    result.close("first", public_uniform_noise(0, rows, cpu)[None], outs["sine_waves_first_64"])
    result.close("last", public_uniform_noise(end - rows, rows, cpu)[None], outs["sine_waves_last_64"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow_noise = torch.randn(1, 80, 15000)
        result.close("rand_noise", flow_noise[:, :, :rows], outs["rand_noise_first_64"])
        torch.set_rng_state(public_generator_state()[1])
        for _ in range(PUBLIC_BLOCKS):
            torch.rand(BLOCK, 9)
        nn.Linear(9, 1)
        result.close("uv", torch.rand(1, rows, 1), outs["uv_first_64"])
