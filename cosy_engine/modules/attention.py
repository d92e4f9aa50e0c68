"""What the attention layers of the flow share: chunk masks and the memory of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosy_engine.modules.streaming import State


def attention_mask(past: int, new: int, chunk: int, device: torch.device, valid: Tensor | None = None) -> Tensor | None:
    """Which keys the new positions see: bool `[B or 1, 1, new or 1, past+new]`, or None if they see all.

    Position i sees key j if `j < (i // chunk + 1) * chunk`: its own chunk as far as it has been fed, and all before it.

    Args:
        past: positions fed before.
        new: positions fed now.
        chunk: length of a chunk; 0 means no chunks, every position sees every key.
        valid: `[B, 1, new]`, nonzero where a new position is not padding. Padding is hidden as key only.
    """
    mask = None
    # An exported graph serves every length, so it always has the mask.
    if chunk and (torch.compiler.is_exporting() or past + new > (past // chunk + 1) * chunk):
        end_of_chunk = (torch.arange(past, past + new, device=device) // chunk + 1) * chunk
        mask = (torch.arange(past + new, device=device) < end_of_chunk[:, None])[None, None]
    if valid is not None:
        keys = F.pad(valid.bool(), (past, 0), value=True)[:, None]
        mask = keys if mask is None else mask & keys
    return mask


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, heads*d]` -> `[B, heads, T, d]`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, heads, T, d]` -> `[B, T, heads*d]`."""
    return x.transpose(1, 2).flatten(2)


def no_keys(batch_size: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> State:
    """State of an attention layer before its first position: `key` and `value`, `[B, heads, 0, d]` each."""
    empty = torch.empty(batch_size, heads, 0, head_dim, device=device, dtype=dtype)
    return {"key": empty, "value": empty}


def past_positions(state: State | None) -> int:
    """How many positions an attention layer with this state has been fed."""
    return 0 if state is None else state["key"].shape[2]


def append_keys(key: Tensor, value: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    """All keys and values so far, `[B, heads, past+new, d]`; they are what the state holds from now on."""
    if state is None:
        return key, value
    state["key"] = torch.cat([state["key"], key], dim=2)
    state["value"] = torch.cat([state["value"], value], dim=2)
    return state["key"], state["value"]
