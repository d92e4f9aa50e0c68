"""What a module remembers between chunks, as plain data.

A `State` is a nested dict that mirrors the module tree: its leaves are tensors (batch first), ints, and the keys and
values of attention layers. It belongs to a request or to a voice, never to the module. Tensors in a state are replaced,
never written in place, and keys and values know how to be shared, so `fork_state` is cheap and two requests can
continue from the same voice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor, nn

from cosy_engine.modules.key_values import KeyValues

Leaf = Tensor | int | KeyValues
State = dict[str, Union[Leaf, list[KeyValues], "State"]]


def init_state(module: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
    """The state of `module` before its first frame.

    A module that remembers defines `init_own_state(batch_size, device, dtype) -> State`. A module whose children need
    something else than one state each (ten Euler steps, say) defines `init_state` with the same arguments instead.
    """
    if hasattr(module, "init_state"):
        return module.init_state(batch_size, device, dtype)
    state: State = {}
    if hasattr(module, "init_own_state"):
        state.update(module.init_own_state(batch_size, device, dtype))
    for name, child in module.named_children():
        child_state = init_state(child, batch_size, device, dtype)
        if child_state:
            state[name] = child_state
    return state


def map_state(state: State, change: Callable[[Leaf], Leaf]) -> State:
    """A state of the same form whose leaves are changed."""
    return {
        name: map_state(value, change) if isinstance(value, dict) else change(value) for name, value in state.items()
    }


def fork_state(state: State) -> State:
    """A copy that can go on independently; the tensors are shared."""
    return map_state(state, lambda leaf: leaf.fork() if hasattr(leaf, "fork") else leaf)


def move_state(state: State, device: torch.device) -> State:
    """A copy on another device."""
    return map_state(state, lambda leaf: leaf if isinstance(leaf, int) else leaf.to(device))


def stack_states(states: Sequence[State]) -> State:
    """One state for a batch: the tensors row after row, the keys and values side by side, as their lengths differ."""
    first = states[0]
    stacked: State = {}
    for name, value in first.items():
        values = [state[name] for state in states]
        if isinstance(value, dict):
            stacked[name] = stack_states(values)
        elif isinstance(value, Tensor):
            stacked[name] = torch.cat(values)
        elif isinstance(value, KeyValues):
            stacked[name] = values
        else:
            if any(other != value for other in values):
                raise ValueError(f"The states differ in {name}: {values}.")
            stacked[name] = value
    return stacked


def unstack_state(stacked: State, states: Sequence[State]) -> None:
    """Give each of `states` its rows of the stacked tensors; the keys and values are theirs already."""
    for name, value in stacked.items():
        if isinstance(value, dict):
            unstack_state(value, [state.setdefault(name, {}) for state in states])
        elif isinstance(value, Tensor):
            for state, rows in zip(states, value.chunk(len(states)), strict=True):
                state[name] = rows
        elif isinstance(value, int):
            for state in states:
                state[name] = value


def flatten_state(state: State, prefix: str = "") -> dict[str, Tensor]:
    """`{"encoders.0.self_attn.past.key": tensor, ...}`, as safetensors stores it; ints become int64 scalars."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat.update(flatten_state(value, f"{prefix}{name}."))
        elif isinstance(value, KeyValues):
            flat[f"{prefix}{name}.key"], flat[f"{prefix}{name}.value"] = value.keys, value.values
        else:
            flat[prefix + name] = value if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def form_of(state: State) -> Hashable:
    """What states must have in common to share a batch or a graph: the shapes of their tensors, and their numbers."""
    return tuple(
        (name, tuple(tensor.shape) if tensor.dim() else tensor.item()) for name, tensor in flatten_state(state).items()
    )


def write_state(state: State, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Replace the tensors of `state` by those that `flatten_state` would name so."""
    for name, value in state.items():
        path = prefix + name
        if isinstance(value, dict):
            write_state(value, tensors, f"{path}.")
        elif isinstance(value, KeyValues):
            state[name] = KeyValues(tensors[f"{path}.key"], tensors[f"{path}.value"])
        elif isinstance(value, Tensor):
            state[name] = tensors[path]


def state_bytes(state: State) -> int:
    """Bytes held by a state, room for more included."""
    total = 0
    for value in state.values():
        if isinstance(value, dict):
            total += state_bytes(value)
        elif not isinstance(value, int):
            total += value.nbytes
    return total
