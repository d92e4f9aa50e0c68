from __future__ import annotations

import pytest
import torch

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.modules.unet import CausalConditionalDecoder
from tests.modules.small_flow import small_estimator


@torch.no_grad()
def test_velocity_of_padding_is_zero() -> None:
    x, mu, cond = torch.randn(3, 2, 80, 20)
    mask = torch.ones(2, 1, 20)
    mask[1, :, 15:] = 0
    velocity = small_estimator("cosyvoice2")(x, mask, mu, torch.rand(2), torch.randn(2, 80), cond)
    assert velocity[1, :, 15:].eq(0).all()
    assert velocity[0].ne(0).all()


def test_early_configuration_builds_the_same_unet() -> None:
    sizes = {"in_channels": 320, "out_channels": 80, "channels": [16], "n_blocks": 1, "num_mid_blocks": 1}
    early = CausalConditionalDecoder(**sizes, causal=True, dropout=0.0, act_fn="gelu")
    late = CausalConditionalDecoder(**sizes, static_chunk_size=50, num_decoding_left_chunks=-1)
    early.load_state_dict(late.state_dict())
    assert early.static_chunk_size == 50


@pytest.mark.parametrize("unknown", [{"causal": False}, {"channels": [16, 16]}, {"act_fn": "snakebeta"}])
def test_a_unet_that_no_model_has_is_refused(unknown: dict) -> None:
    with pytest.raises(ModelDirectoryError):
        CausalConditionalDecoder(320, 80, **unknown)
