"""What the U-Net and the DiT promise alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosy_engine.modules.attention import SelfAttention
from cosy_engine.modules.streaming import init_state
from tests.modules.small_flow import small_estimator

VERSIONS = ["cosyvoice2", "cosyvoice3"]


def _inputs(frames: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    x, mu, cond = torch.randn(3, batch, 80, frames, generator=generator)
    t, spks = torch.rand(batch, generator=generator), torch.randn(batch, 80, generator=generator)
    return {"x": x, "mask": torch.ones(batch, 1, frames), "mu": mu, "t": t, "spks": spks, "cond": cond}


def _cut(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    return {name: value[:, :, start:end] if value.dim() == 3 else value for name, value in inputs.items()}


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_padding_does_not_reach_the_other_frames(version: str) -> None:
    estimator, inputs = small_estimator(version), _inputs(60)
    inputs["mask"][1, :, 45:] = 0
    together = estimator(**inputs)
    torch.testing.assert_close(together[0], estimator(**_inputs(60))[0], atol=1e-5, rtol=1e-5)
    alone = estimator(**{name: value[1:] for name, value in _cut(inputs, 0, 45).items()})
    torch.testing.assert_close(together[1:, :, :45], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_without_a_mask_no_frame_is_padding(version: str) -> None:
    estimator, inputs = small_estimator(version), _inputs(60)
    expected = estimator(**inputs, streaming=True)
    inputs["mask"] = None
    torch.testing.assert_close(estimator(**inputs, streaming=True), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_frame_of_a_later_chunk_changes_nothing_before(version: str) -> None:
    estimator, inputs = small_estimator(version), _inputs(120)
    before = estimator(**inputs, streaming=True)
    inputs["x"][:, :, 100] += 1
    after = estimator(**inputs, streaming=True)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.allclose(before[:, :, 100:], after[:, :, 100:])


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_chunks_with_padding_at_the_end_of_the_last(version: str) -> None:
    estimator, inputs = small_estimator(version).double(), _inputs(130)
    inputs = {name: value.double() for name, value in inputs.items()}
    inputs["mask"][1, :, 120:] = 0
    whole = estimator(**inputs, streaming=True)
    state = init_state(estimator, 2, whole.device, whole.dtype)
    parts = [
        estimator(**_cut(inputs, start, end), streaming=True, state=state)
        for start, end in [(0, 50), (50, 100), (100, 130)]
    ]
    chunked = torch.cat(parts, dim=2)
    torch.testing.assert_close(chunked[0], whole[0])
    torch.testing.assert_close(chunked[1, :, :120], whole[1, :, :120])


@pytest.mark.parametrize("version", VERSIONS)
def test_exports_for_any_number_of_frames(version: str) -> None:
    estimator = small_estimator(version)
    frames = torch.export.Dim("frames", min=2, max=3000)
    shapes = {name: {2: frames} if value.dim() == 3 else None for name, value in _inputs(40).items()}
    program = torch.export.export(estimator, (), _inputs(40), dynamic_shapes=shapes).module()
    with torch.no_grad():
        torch.testing.assert_close(program(**_inputs(77)), estimator(**_inputs(77)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_joined_projections_give_the_same_and_end_with_other_weights(version: str) -> None:
    estimator, inputs = small_estimator(version), _inputs(60)
    expected, names = estimator(**inputs), {name: value.clone() for name, value in estimator.state_dict().items()}
    layers = [layer for layer in estimator.modules() if isinstance(layer, SelfAttention)]
    for layer in layers:
        layer.join_projections()
    torch.testing.assert_close(estimator(**inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, names[name]) for name, value in estimator.state_dict().items())
    estimator.load_state_dict({name: value * 2 for name, value in names.items()})
    doubled = estimator(**inputs)
    assert layers and all(layer._joint is not None for layer in layers)
    estimator.double().float()
    assert all(layer._joint is None for layer in layers)
    torch.testing.assert_close(doubled, estimator(**inputs), atol=1e-5, rtol=1e-4)
