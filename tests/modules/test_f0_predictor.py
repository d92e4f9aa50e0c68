from __future__ import annotations

import pytest
import torch

from cosy_engine.modules.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor

PREDICTORS = [(ConvRNNF0Predictor, 5), (CausalConvRNNF0Predictor, 3)]


@pytest.mark.parametrize(("predictor_class", "lookahead"), PREDICTORS)
def test_pitch_does_not_depend_on_the_chunks(predictor_class: type[ConvRNNF0Predictor], lookahead: int) -> None:
    torch.manual_seed(0)
    predictor = predictor_class(in_channels=80, cond_channels=8)
    mel = torch.randn(2, 80, 30)
    whole = predictor(mel)
    assert whole.shape == (2, 30) and whole.dtype == torch.float32
    assert bool((whole >= 0).all())
    state = {}
    first = predictor(mel[..., :13], state, finalize=False)
    rest = predictor(mel[..., 13:], state)
    assert first.shape[-1] == 13 - lookahead == predictor.ready(13)
    torch.testing.assert_close(torch.cat([first, rest], dim=-1), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("predictor_class", "lookahead"), PREDICTORS)
def test_how_far_it_looks_ahead(predictor_class: type[ConvRNNF0Predictor], lookahead: int) -> None:
    torch.manual_seed(0)
    predictor = predictor_class(in_channels=80, cond_channels=8)
    mel = torch.randn(1, 80, 30)
    changed = mel.clone()
    changed[..., 20] += 1
    differs = (predictor(mel) != predictor(changed))[0].nonzero()
    assert int(differs[0]) == 20 - lookahead
