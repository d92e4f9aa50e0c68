"""The flow's velocity estimator as ONNX, with the published interface: x, mask, mu, t, spks, cond -> estimator_out."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cosy_engine.errors import InvalidRequestError
from cosy_engine.modules.streaming import flatten_state, fork_state, init_state, write_state

Variant = Literal["whole", "chunked", "cached"]

INPUTS = ("x", "mask", "mu", "t", "spks", "cond")
OUTPUT = "estimator_out"
STATE, NEXT_STATE = "state.", "next_state."
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16"}
OPSET = 18


def file_name(variant: Variant, dtype: torch.dtype) -> str:
    """`flow.decoder.estimator.fp32.onnx` as published; other variants name themselves before the precision."""
    part = "" if variant == "whole" else f"{variant}."
    return f"flow.decoder.estimator.{part}{PRECISIONS[dtype]}.onnx"


def export_estimator(estimator: nn.Module, path: Path, variant: Variant = "whole") -> None:
    """Write an estimator to one ONNX file, in the precision of its weights, for any batch and any number of frames.

    Inputs, B being the two guidance halves of each request: x, mu, cond `[B, 80, T]`, mask `[B, 1, T]`, t `[B]`,
    spks `[B, 80]`; t is float32, the others have the precision of the weights. Output: estimator_out `[B, 80, T]`.

    Args:
        variant: `whole` lets every frame see every other; `chunked` has the streaming mask; `cached` is one Euler step
            of a stream: it has the streaming mask, and an input `state.NAME` and an output `next_state.NAME` for each
            tensor of the estimator's state (`streaming.flatten_state`).

    Raises:
        InvalidRequestError: the weights are neither float32 nor float16.
    """
    estimator = copy.deepcopy(estimator).cpu().eval()
    dtype = next(estimator.parameters()).dtype
    if dtype not in PRECISIONS:
        raise InvalidRequestError(f"The estimator can be exported in float32 and float16, not in {dtype}.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages that this graph has no use for
    step = _Step(estimator, variant, dtype)
    arguments, shapes = _example(step, dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own affairs
        program = torch.onnx.export(
            step,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=[*INPUTS, *(STATE + name for name in step.fresh)],
            output_names=[OUTPUT, *(NEXT_STATE + name for name in step.fresh)],
            dynamic_shapes=shapes,
            verbose=False,
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        program.save(written, external_data=False)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)


class _Step(nn.Module):
    """The estimator as a function of tensors alone."""

    def __init__(self, estimator: nn.Module, variant: Variant, dtype: torch.dtype) -> None:
        super().__init__()
        self.estimator, self.variant = estimator, variant
        self.state = init_state(estimator, 2, torch.device("cpu"), dtype) if variant == "cached" else None
        self.fresh = flatten_state(self.state or {})

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        state = self.state and fork_state(self.state)
        if state:
            write_state(state, dict(zip(self.fresh, tensors, strict=True)))
        velocity = self.estimator(x, mask, mu, t, spks, cond, streaming=self.variant != "whole", state=state)
        return velocity, *(flatten_state(state).values() if state else ())


def _example(step: _Step, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """Arguments of `_Step.forward` and which of their axes may have any length."""
    batch, frames, past = (torch.export.Dim(name) for name in ("batch", "frames", "past"))
    sizes = {"batch": 2, "frames": 60, "past": 40}
    sequence, vector = {0: batch, 2: frames}, {0: batch}

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    def mel() -> Tensor:
        return ones(2, 80, sizes["frames"])  # each its own tensor: one given twice would become one input

    arguments = [mel(), ones(2, 1, sizes["frames"]), mel(), torch.ones(2), ones(2, 80), mel()]
    shapes: list[dict[int, object]] = [sequence, sequence, sequence, vector, vector, sequence]
    for tensor in step.fresh.values():
        grows = tensor.dim() == 4  # keys and values: [batch, heads, past, d]
        if grows:
            tensor = tensor.new_ones(*tensor.shape[:2], sizes["past"], tensor.shape[3])
        arguments.append(tensor)
        shapes.append({0: batch, 2: past} if grows else vector)
    states = (tuple(shapes[6:]),) if step.fresh else ()
    return tuple(arguments), (*shapes[:6], *states)
