"""Checkpoints as small files, to bring them over from a machine that gives back little at a time.

    python -m recipes.embedded.carry pack flow.pt speech_lm.pt --output PARTS
    python -m recipes.embedded.carry unpack PARTS --output CHECKPOINTS

Packed are the averaged weights in float16, without the optimizers' state; a stage goes on from them with a fresh
optimizer. What is learnt beside the tokenizer stays behind.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import torch
from torch import Tensor

from recipes.embedded.training import averaged_state

PART_BYTES = 15 * 2**20


def pack(checkpoint: Path, output: Path) -> None:
    """Write `NAME.00`, `NAME.01`, ... of at most PART_BYTES."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    packed = {"step": state["step"], "model": _half(averaged_state(checkpoint))}
    if "judges" in state:
        packed["judges"] = _half(state["judges"])
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    data = buffer.getvalue()
    for start in range(0, len(data), PART_BYTES):
        part = output / f"{checkpoint.stem}.{start // PART_BYTES:02d}"
        part.write_bytes(data[start : start + PART_BYTES])
    print(f"{checkpoint.stem}: step {state['step']}, {len(data) / 1e6:.1f} MB", flush=True)


def unpack(parts: Path, output: Path) -> None:
    """Join the parts of every checkpoint into one that its stage and export.py can read."""
    output.mkdir(parents=True, exist_ok=True)
    for name in sorted({path.stem for path in parts.iterdir() if re.fullmatch(r"\.\d\d", path.suffix)}):
        data = b"".join(path.read_bytes() for path in sorted(parts.glob(f"{name}.[0-9][0-9]")))
        state = torch.load(io.BytesIO(data), weights_only=True)
        for part in ("model", "judges"):
            if part in state:
                state[part] = _float(state[part])
        state["average"] = state["model"]
        torch.save(state, output / f"{name}.pt")
        print(f"{name}.pt: step {state['step']}", flush=True)


def _float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32; what was shared still is."""
    made = {value.data_ptr(): value.float() if value.is_floating_point() else value for value in state.values()}
    return {name: made[value.data_ptr()] for name, value in state.items()}


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float16, tensors that share memory still shared, without the tokenizer's teacher."""
    made: dict[int, Tensor] = {}
    result = {}
    for name, value in state.items():
        if name.startswith("teacher."):
            continue
        if value.data_ptr() not in made:
            made[value.data_ptr()] = value.half().clone() if value.is_floating_point() else value.clone()
        result[name] = made[value.data_ptr()]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.inputs:
        (pack if arguments.action == "pack" else unpack)(path, arguments.output)


if __name__ == "__main__":
    main()
