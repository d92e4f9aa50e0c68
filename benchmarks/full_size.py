"""A model of the published sizes with random weights: what it computes costs the same, what it says is noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks.speech_lm import random_lm
from cosy_engine.checkpoint.load import CosyVoiceModel, load_model
from cosy_engine.modules.dit import DiT
from cosy_engine.modules.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor
from cosy_engine.modules.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.hift import CausalHiFTGenerator, HiFTGenerator
from cosy_engine.modules.streaming_layers import fold_weight_norm
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder
from tests.standin import write_standin

Version = Literal[2, 3]


def random_model(version: Version, directory: Path, device: torch.device, dtype: torch.dtype) -> CosyVoiceModel:
    """The networks are made on the device; tokenizer and ONNX models are a stand-in's, written into `directory`."""
    model = load_model(write_standin(directory, f"cosyvoice{version}"))
    with torch.device(device):
        lm = random_lm(version)  # sets the seed for all
        flow, hift = random_flow(version), random_vocoder(version)
    fold_weight_norm(hift)
    lm.to(dtype)
    for parameter in flow.parameters():  # buffers are tables and keep their precision
        parameter.data = parameter.data.to(dtype)
    for module in (lm, flow, hift):
        module.to(device).eval().requires_grad_(False)
    return replace(model, lm=lm, flow=flow, hift=hift, device=device, dtype=dtype)


def random_flow(version: Version) -> nn.Module:
    if version == 2:
        encoder = UpsampleConformerEncoder(
            input_size=512, output_size=512, attention_heads=8, linear_units=2048, num_blocks=6, static_chunk_size=25
        )
        unet = CausalConditionalDecoder(
            in_channels=320, out_channels=80, channels=[256], n_blocks=4, num_mid_blocks=12, num_heads=8
        )
        return CausalMaskedDiffWithXvec(encoder=encoder, decoder=_solver(unet))
    look_ahead = PreLookaheadLayer(in_channels=80, channels=1024, pre_lookahead_len=3)
    dit = DiT(dim=1024, depth=22, heads=16, dim_head=64, ff_mult=2)
    return CausalMaskedDiffWithDiT(pre_lookahead_layer=look_ahead, decoder=_solver(dit))


def random_vocoder(version: Version) -> nn.Module:
    """Their defaults are the published sizes."""
    if version == 2:
        return HiFTGenerator(f0_predictor=ConvRNNF0Predictor())
    return CausalHiFTGenerator(f0_predictor=CausalConvRNNF0Predictor())


def _solver(estimator: nn.Module) -> CausalConditionalCFM:
    settings = {
        "sigma_min": 1e-6,
        "solver": "euler",
        "t_scheduler": "cosine",
        "training_cfg_rate": 0.2,
        "inference_cfg_rate": 0.7,
    }
    return CausalConditionalCFM(in_channels=240, cfm_params=settings, estimator=estimator)
