"""What a module remembers between chunks, as plain data.

A `State` is a nested dict that mirrors the module tree: its leaves are tensors (batch first) or ints. It belongs to a
request or to a voice, never to the module. Tensors in a state are replaced, never written in place, so `fork_state`
is cheap and two requests can continue from the same voice.
"""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor, nn

State = dict[str, Union[Tensor, int, "State"]]


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


def fork_state(state: State) -> State:
    """A copy that can go on independently; the tensors are shared."""
    return {key: fork_state(value) if isinstance(value, dict) else value for key, value in state.items()}


def flatten_state(state: State, prefix: str = "") -> dict[str, Tensor]:
    """`{"encoders.0.self_attn.key": tensor, ...}`, as safetensors stores it; ints become int64 scalars."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat.update(flatten_state(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def state_bytes(state: State) -> int:
    """Bytes held by the tensors of a state."""
    return sum(tensor.nbytes for tensor in flatten_state(state).values())
