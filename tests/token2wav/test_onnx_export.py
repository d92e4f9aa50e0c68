from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.errors import InvalidRequestError
from cosy_engine.modules.streaming import flatten_state, init_state
from cosy_engine.token2wav.onnx_export import export_estimator
from tests.golden.flow import build_estimator
from tests.golden.registry import Case
from tests.token2wav.onnx_estimator import OnnxEstimator

CALLS = [(2, 2), (2, 49), (4, 50), (2, 77), (6, 130)]  # batch and frames


def _inputs(batch: int, frames: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(frames)
    x, mu, cond = torch.randn(3, batch, 80, frames, generator=numbers).to(dtype)
    mask = torch.ones(batch, 1, frames, dtype=dtype)
    mask[-1, :, frames * 2 // 3 :] = 0
    t, spks = torch.rand(batch, generator=numbers), torch.randn(batch, 80, generator=numbers).to(dtype)
    return {"x": x, "mask": mask, "mu": mu, "t": t, "spks": spks, "cond": cond}


def _described(path: Path) -> dict[str, list[object]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def test_has_the_published_name_and_interface(exported: Callable[..., Path]) -> None:
    path = exported("whole")
    sequence = ["batch", 80, "frames"]
    assert path.name == "flow.decoder.estimator.fp32.onnx"
    assert _described(path) == {
        "x": sequence,
        "mask": ["batch", 1, "frames"],
        "mu": sequence,
        "t": ["batch"],
        "spks": ["batch", 80],
        "cond": sequence,
        "estimator_out": sequence,
    }


@torch.no_grad()
def test_whole_equals_pytorch_at_any_batch_and_length(model: CosyVoiceModel, exported: Callable[..., Path]) -> None:
    onnx_estimator = OnnxEstimator(exported("whole"))
    for call in CALLS:
        inputs = _inputs(*call)
        got, want = onnx_estimator(inputs)["estimator_out"], model.flow.decoder.estimator(**inputs)
        keep = inputs["mask"].bool().expand_as(want)
        torch.testing.assert_close(got[keep], want[keep], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_chunk_masked_in_half_precision(model: CosyVoiceModel, exported: Callable[..., Path]) -> None:
    path = exported("chunked", "--fp16")
    assert path.name == "flow.decoder.estimator.chunked.fp16.onnx"
    onnx_estimator, estimator = OnnxEstimator(path), copy.deepcopy(model.flow.decoder.estimator).half()
    for call in CALLS:
        inputs = _inputs(*call, torch.float16)
        got, want = onnx_estimator(inputs)["estimator_out"], estimator(**inputs, streaming=True)
        keep = inputs["mask"].bool().expand_as(want)
        assert got.dtype == torch.float16
        torch.testing.assert_close(got[keep], want[keep], atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_cached_step_equals_pytorch_from_chunk_to_chunk(model: CosyVoiceModel, exported: Callable[..., Path]) -> None:
    estimator, onnx_estimator = model.flow.decoder.estimator, OnnxEstimator(exported("cached"))
    state = init_state(estimator, 2, torch.device("cpu"), torch.float32)
    given = {f"state.{name}": tensor for name, tensor in flatten_state(state).items()}
    for frames in (50, 100, 50, 200, 26):
        inputs = _inputs(2, frames) | {"mask": torch.ones(2, 1, frames)}
        outputs = onnx_estimator(inputs | given)
        want = estimator(**inputs, streaming=True, state=state)
        torch.testing.assert_close(outputs.pop("estimator_out"), want, atol=1e-4, rtol=1e-4)
        given = {name.removeprefix("next_"): tensor for name, tensor in outputs.items()}
        remembered = {f"state.{name}": tensor for name, tensor in flatten_state(state).items()}
        torch.testing.assert_close(given, remembered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [f"cv{version}_estimator_{mask}" for version in (2, 3) for mask in ("full", "stream")])
def test_gives_the_reference_values(name: str, golden_dir: Path, tmp_path: Path) -> None:
    case = Case.read(golden_dir / f"{name}.json")
    estimator = build_estimator(case.meta["constructor"])
    estimator.load_state_dict(case.weights("model"))
    path = tmp_path / "estimator.onnx"
    export_estimator(estimator, path, "chunked" if case.meta["call"]["streaming"] else "whole")
    got = OnnxEstimator(path)(case.ins)["estimator_out"]
    atol, rtol = case.tolerance
    torch.testing.assert_close(got, case.outs["y"], atol=atol, rtol=rtol)
    assert [entry.name for entry in tmp_path.iterdir()] == ["estimator.onnx"]


def test_refuses_other_precisions(model: CosyVoiceModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="bfloat16"):
        export_estimator(copy.deepcopy(model.flow.decoder.estimator).bfloat16(), tmp_path / "estimator.onnx")
    assert not list(tmp_path.iterdir())
