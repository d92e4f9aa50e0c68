"""Both flows in a size that a test can afford, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from cosy_engine.modules.dit import DiT
from cosy_engine.modules.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder

CFM_PARAMS = {
    "sigma_min": 1e-6,
    "solver": "euler",
    "t_scheduler": "cosine",
    "training_cfg_rate": 0.2,
    "inference_cfg_rate": 0.7,
    "reg_loss_type": "l1",
}


def small_encoder(input_size: int = 12) -> UpsampleConformerEncoder:
    return UpsampleConformerEncoder(
        input_size, 16, attention_heads=2, linear_units=24, num_blocks=2, num_up_blocks=1, static_chunk_size=25
    ).eval()


def small_estimator(version: str) -> nn.Module:
    if version == "cosyvoice2":
        estimator = CausalConditionalDecoder(
            320, 80, [16], dropout=0.0, attention_head_dim=8, num_heads=2, num_mid_blocks=1
        )
    else:
        estimator = DiT(dim=32, depth=2, heads=2, dim_head=16, ff_mult=2)
    return estimator.eval()


def small_flow(version: str, seed: int = 0) -> nn.Module:
    """`version`: cosyvoice2 or cosyvoice3. 40 speech tokens."""
    torch.manual_seed(seed)
    decoder = CausalConditionalCFM(240, CFM_PARAMS, estimator=small_estimator(version))
    if version == "cosyvoice2":
        flow = CausalMaskedDiffWithXvec(12, vocab_size=40, encoder=small_encoder(), decoder=decoder)
    else:
        layer = PreLookaheadLayer(80, 24)
        flow = CausalMaskedDiffWithDiT(vocab_size=40, pre_lookahead_layer=layer, decoder=decoder)
    return flow.eval()
