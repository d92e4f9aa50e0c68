"""What the attention layers of the flow share: chunk masks, and attention to what was fed before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.streaming import State


@dataclass
class PaddedPast:
    """Keys and values of all rows of a batch in one buffer, whatever their pasts: for shapes that never change.

    Attributes:
        keys, values: `[B, heads, width, d]`: a row's past, room up to position `capacity`, the new positions, room.
        lengths: int64 `[B]`, the past positions of each row.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    capacity: int

    def append(self, key: Tensor, value: Tensor) -> None:
        """The new positions, `[B, heads, new, d]` each; the past stays as it is."""
        end = self.capacity + key.shape[2]
        self.keys[:, :, self.capacity : end] = key
        self.values[:, :, self.capacity : end] = value

    def mask(self, seen: Tensor) -> Tensor:
        """`[B, 1, new, width]` from which of the new positions see which, `[B or 1, 1, new or 1, new]`."""
        batch, new = len(self.lengths), seen.shape[3]
        before = torch.arange(self.capacity, device=seen.device) < self.lengths[:, None]
        before = before[:, None, None].expand(-1, -1, new, -1)
        mask = torch.cat([before, seen.expand(batch, 1, new, new)], dim=3)
        return F.pad(mask, (0, self.keys.shape[2] - mask.shape[3]))


def attention_masks(
    pasts: Sequence[int] | PaddedPast, new: int, chunk: int, device: torch.device, valid: Tensor | None = None
) -> list[Tensor | None]:
    """For each stream of a batch, which keys its new positions see: bool `[rows or 1, 1, new or 1, past+new]`, or None
    if they see all.

    Position i of those fed now sees all that were fed before, and of the new ones its own chunk and those before it.
    So a chunk is final once it has been fed, and what is fed at a time begins a chunk.

    Args:
        pasts: positions fed before, of each stream, as `past_lengths` tells.
        new: positions fed now.
        chunk: length of a chunk; 0 means no chunks, every position sees every key.
        valid: `[B, 1, new]`, nonzero where a new position is not padding. Padding is hidden as key only.
    """
    seen = None
    if chunk and (torch.compiler.is_exporting() or new > chunk):  # an exported graph serves every length
        position = torch.arange(new, device=device)
        seen = (position < ((position // chunk + 1) * chunk)[:, None])[None, None]
    if isinstance(pasts, PaddedPast):
        everything = torch.ones(1, 1, 1, new, dtype=torch.bool, device=device)
        return [pasts.mask(_both(_both(everything, seen), None if valid is None else valid.bool()[:, None]))]
    rows = [None] * len(pasts) if valid is None else rows_of(valid.bool()[:, None], len(pasts))
    return [_with_past(_both(seen, own), past) for past, own in zip(pasts, rows, strict=True)]


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a & b


def _with_past(mask: Tensor | None, past: int) -> Tensor | None:
    return None if mask is None else F.pad(mask, (past, 0), value=True)


def rows_of(tensor: Tensor, streams: int) -> Sequence[Tensor]:
    """The rows of each stream of a batch; they have as many each."""
    return [tensor] if streams == 1 else tensor.chunk(streams)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, heads*d]` -> `[B, heads, T, d]`."""
    batch, frames, width = x.shape
    return x.view(batch, frames, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, heads, T, d]` -> `[B, T, heads*d]`."""
    return x.transpose(1, 2).flatten(2)


def no_past(batch_size: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> State:
    """State of an attention layer before its first position: the keys and values of its `past`."""
    return {"past": KeyValues.empty(batch_size, heads, head_dim, device, dtype)}


def past_of(state: State | None) -> list[KeyValues] | list[PaddedPast]:
    """What each stream of a batch has been fed, from the state of an attention layer; nothing without a state."""
    past = [] if state is None else state["past"]
    return past if isinstance(past, list) else [past]


def past_lengths(state: State | None) -> list[int] | PaddedPast:
    """How many positions each stream of a batch has been fed; `[0]` without a state."""
    pasts = past_of(state)
    if pasts and isinstance(pasts[0], PaddedPast):
        return pasts[0]
    return [past.length for past in pasts] or [0]


def past_positions(pasts: list[int] | PaddedPast, new: int, rows: int, device: torch.device) -> Tensor:
    """The positions of what is fed now, `[1 or rows, new]`; the streams share the rows of a batch evenly."""
    if isinstance(pasts, PaddedPast):
        return pasts.lengths[:, None] + torch.arange(new, device=device)
    positions = torch.stack([torch.arange(past, past + new, device=device) for past in pasts])
    return positions if len(pasts) == 1 else positions.repeat_interleave(rows // len(pasts), dim=0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor | None], state: State | None = None
) -> Tensor:
    """Attention of new positions to themselves and to all before them.

    Args:
        query, key, value: `[B, heads, new, d]` of the new positions. A batch may hold several streams, which have as
            many rows each.
        masks: of `attention_mask`, one for each stream.
        state: of the layer; the keys and values are appended. None: nothing was before.

    Returns:
        `[B, heads, new, d]`.
    """
    streams = past_of(state)
    if not streams:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=masks[0])
    attended = []
    rows = zip(*(rows_of(tensor, len(streams)) for tensor in (query, key, value)), masks, streams, strict=True)
    for query, key, value, mask, past in rows:
        past.append(key, value)
        attended.append(F.scaled_dot_product_attention(query, past.keys, past.values, attn_mask=mask))
    return attended[0] if len(attended) == 1 else torch.cat(attended)
