"""Load weight files without running anything of theirs, and put them into modules."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from cosy_engine.errors import ModelDirectoryError, UnsafeModelError

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

_LISTED = 5  # keys named per problem; the rest are counted
_BOOKKEEPING = ("epoch", "step")  # what training scripts save beside the weights
_GAN_PREFIX = "generator."
_OLD_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


class Part(NamedTuple):
    """A module, the file of its weights, and the precision that they are kept in."""

    path: Path
    module: nn.Module
    dtype: torch.dtype


def load_state(path: Path) -> State:
    """The tensors of a `.pt` or `.safetensors` file, on the CPU, memory-mapped where the format allows it.

    Keys come as the modules have them: the prefix `generator.` of a GAN checkpoint is stripped (its discriminators are
    dropped) and the older names of weight norm are translated.

    Raises:
        UnsafeModelError: the file needs more than tensors; nothing of it was run.
        ModelDirectoryError: the file is damaged, or does not hold named tensors.
    """
    state = _read(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ModelDirectoryError(f"{path.name} does not hold named tensors.")
    state = {key: value for key, value in state.items() if key not in _BOOKKEEPING}
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelDirectoryError(f"{path.name} holds more than tensors: {_shortened(strange)}.")
    if any(key.startswith(_GAN_PREFIX) for key in state):
        state = {key.removeprefix(_GAN_PREFIX): value for key, value in state.items() if key.startswith(_GAN_PREFIX)}
    return {_current_name(key): value for key, value in state.items()}


def find_problems(module: nn.Module, state: State) -> list[str]:
    """How the tensors differ from what the module needs, one sentence a kind; empty when they fit."""
    expected = module.state_dict(keep_vars=True)
    missing = [names[0] for names in _tied_names(expected) if not any(name in state for name in names)]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} is {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return [f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in problems.items() if keys]


def load_parts(parts: list[Part], device: torch.device) -> None:
    """Load every part's file into its module; all problems of all files are reported together.

    Parameters are put on `device` in the part's precision, one tensor at a time.

    Raises:
        UnsafeModelError: a file needs more than tensors; nothing of it was run.
        ModelDirectoryError: damaged files, missing and unexpected keys, other shapes; listed by file.
    """
    states: dict[Path, State] = {}
    problems: dict[str, list[str]] = {}
    for part in parts:
        try:
            states[part.path] = load_state(part.path)
        except UnsafeModelError:
            raise
        except ModelDirectoryError as error:
            problems[part.path.name] = [error.message]
        else:
            problems[part.path.name] = find_problems(part.module, states[part.path])
    lines = [f"  {file}: {problem}" for file, found in problems.items() for problem in found]
    if lines:
        raise ModelDirectoryError("\n".join(["The weights do not fit the configuration beside them.", *lines]))
    for part in parts:
        _assign(part, states.pop(part.path), device)


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error))
        what = f"it names {named.group(1)}" if named else "it is damaged, or needs code to be run"
        raise UnsafeModelError(
            f"{path.name} is not a file of plain tensors ({what}). It is refused and nothing of it was run."
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, SafetensorError) as error:
        if "TorchScript" in str(error):
            raise UnsafeModelError(f"{path.name} is a TorchScript program, not a file of tensors; refused.") from None
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise ModelDirectoryError(
            f"{path.name} is truncated or damaged ({reason}). Download or copy it again: {path}"
        ) from None


def _assign(part: Part, state: State, device: torch.device) -> None:
    """Replace the module's parameters and buffers by the file's values; tied names share one tensor.

    Buffers keep the module's precision: they are tables, not weights.
    """
    expected = part.module.state_dict(keep_vars=True)
    groups = _tied_names(expected)
    size = sum(state[name].nbytes for name in state)
    logger.info("Loading %s (%.1f MB)", part.path.name, size / 1e6)
    values: State = {}
    with tqdm(total=size, desc=part.path.name, unit="B", unit_scale=True, leave=False, disable=None) as progress:
        for names in groups:
            source = state[next(name for name in names if name in state)]
            wanted = expected[names[0]]
            dtype = part.dtype if isinstance(wanted, nn.Parameter) else wanted.dtype
            values |= dict.fromkeys(names, source.to(device, dtype, copy=True))
            progress.update(sum(state[name].nbytes for name in names if name in state))
    part.module.load_state_dict(values, assign=True)
    part.module.to(device)  # what no file holds, and modules that keep a precision of their own


def _tied_names(expected: dict[str, Tensor]) -> list[list[str]]:
    """Names grouped by the tensor they mean: safetensors files hold a tied one under a single name."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, value in expected.items():
        groups[id(value)].append(name)
    return list(groups.values())


def _current_name(key: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.{_OLD_WEIGHT_NORM[last]}" if last in _OLD_WEIGHT_NORM else key


def _shortened(items: list[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
