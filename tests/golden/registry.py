"""Cases in the reference values' format, and the checks that replay them, by kind of case."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


@lru_cache(maxsize=8)
def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@dataclass
class Case:
    """One recorded call: `meta` is its JSON, `ins` and `outs` its tensors (float32 where they are floating)."""

    folder: Path
    meta: dict[str, Any]
    ins: dict[str, Tensor]
    outs: dict[str, Tensor]

    @classmethod
    def read(cls, json_path: Path) -> Case:
        meta = json.loads(json_path.read_text(encoding="utf-8"))
        tensors_path = json_path.with_suffix(".safetensors")
        tensors = load_file(tensors_path) if tensors_path.exists() else {}
        ins = {name[3:]: _as_float32(value) for name, value in tensors.items() if name.startswith("in.")}
        outs = {name[4:]: _as_float32(value) for name, value in tensors.items() if name.startswith("out.")}
        return cls(json_path.parent, meta, ins, outs)

    def weights(self, name: str) -> dict[str, Tensor]:
        """State dict of the component `name` of this case."""
        source = self.meta["weights"][name]
        prefix = source["prefix"]
        tensors = _load(self.folder / source["file"])
        return {key[len(prefix) :]: _as_float32(value) for key, value in tensors.items() if key.startswith(prefix)}

    @property
    def tolerance(self) -> tuple[float, float]:
        """(atol, rtol) of the case; exact cases have (0, 0)."""
        tolerance = self.meta["tolerance"]
        return float(tolerance.get("atol", 0.0)), float(tolerance.get("rtol", 0.0))


@dataclass
class CheckResult:
    """Collects comparisons of one case."""

    atol: float
    rtol: float
    max_abs_err: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def close(self, name: str, got: Tensor, want: Tensor, atol: float | None = None, rtol: float | None = None) -> None:
        """Shapes equal and |got - want| <= atol + rtol * |want| everywhere."""
        atol = self.atol if atol is None else atol
        rtol = self.rtol if rtol is None else rtol
        if got.shape != want.shape:
            self.max_abs_err = float("inf")
            self.problems.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            return
        got, want = got.detach().double(), want.double()
        if want.numel() == 0:
            return
        same = got == want  # infinities of the same sign included
        error = torch.where(same, torch.zeros_like(want), (got - want).abs())
        worst = float(error.max())
        self.max_abs_err = max(self.max_abs_err, worst)
        if not bool((error <= atol + rtol * torch.where(same, torch.zeros_like(want), want.abs())).all()):
            self.problems.append(f"{name}: off by {worst:.3g}")

    def equal(self, name: str, got: Any, want: Any) -> None:
        """Exactly the same value."""
        if got != want:
            self.problems.append(f"{name}: {got!r}, expected {want!r}")


Check = Callable[[Case, CheckResult], None]
CHECKS: dict[str, Check] = {}


def check(*kinds: str) -> Callable[[Check], Check]:
    """Register a function for these kinds of case."""

    def register(function: Check) -> Check:
        for kind in kinds:
            CHECKS[kind] = function
        return function

    return register
