"""What the attention layers of the flow share: chunk masks, and attention to what was fed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.streaming import State


@dataclass
class PagedPast:
    """Keys and values of all streams in pages, whatever their pasts: for shapes that never change.

    A stream has two rows, and a list of the pages that hold its positions in turn.

    Attributes:
        pages: `[pages, steps, 2, 2, heads, page, d]` of this layer: keys and values, of the two rows.
        table: int32 `[streams, n]`, the pages of each stream, then those of nothing.
        steps: int32 `[streams]`, which Euler step each is at.
        lengths: int64 `[rows]`, the past positions of each row.
        counts: int64 `[rows]`, how many of the new positions are no padding.
        chunk: length of a chunk of the new positions.
    """

    pages: Tensor
    table: Tensor
    steps: Tensor
    lengths: Tensor
    counts: Tensor
    chunk: int

    def mask(self, new: int) -> Tensor | None:
        """What `attend` wants of the layers' masks, which are alike: `[rows, 1, new, past + new]`, which are seen."""
        device, room = self.lengths.device, self.table.shape[1] * self.pages.shape[5]
        before = torch.arange(room, device=device) < self.lengths[:, None]
        seen = (torch.arange(new, device=device) < self.counts[:, None])[:, None, None]
        if new > self.chunk:
            seen = seen & _chunk_mask(new, self.chunk, device)
        return torch.cat([before[:, None, None].expand(-1, -1, new, -1), seen.expand(-1, -1, new, -1)], dim=3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention to the past and to the new positions, `[rows, heads, new, d]`, which go into the pages."""
        steps = self.steps.long()[:, None]
        past = self.pages[self.table.long(), steps]  # [streams, n, 2, 2, heads, page, d]
        past_keys, past_values = past.permute(2, 0, 3, 4, 1, 5, 6).flatten(1, 2).flatten(3, 4)
        others = torch.arange(past_keys.shape[2], device=query.device) >= self.lengths[:, None]  # may not be numbers
        past_keys, past_values = (part.masked_fill(others[:, None, :, None], 0) for part in (past_keys, past_values))
        self._store(steps, key, value)
        keys, values = torch.cat([past_keys, key], dim=2), torch.cat([past_values, value], dim=2)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def _store(self, steps: Tensor, key: Tensor, value: Tensor) -> None:
        """Padding goes where the table has no more pages of the stream, or the page of nothing."""
        page, new = self.pages.shape[5], torch.arange(key.shape[2], device=key.device)
        position = self.lengths[::2, None] + new
        place = (position // page).clamp(max=self.table.shape[1] - 1)
        own = torch.where(new < self.counts[::2, None], self.table.long().gather(1, place), 0)
        both = torch.stack([key, value]).unflatten(1, (-1, 2))  # [2, streams, 2, heads, new, d]
        self.pages[own, steps, :, :, :, position % page] = both.permute(1, 4, 0, 2, 3, 5)


def attention_masks(
    pasts: Sequence[int] | PagedPast, new: int, chunk: int, device: torch.device, valid: Tensor | None = None
) -> list[Tensor | None]:
    """For each stream of a batch, which keys its new positions see: bool `[rows or 1, 1, new or 1, past+new]`, or None
    if they see all.

    Position i of those fed now sees all that were fed before, and of the new ones its own chunk and those before it.
    So a chunk is final once it has been fed, and what is fed at a time begins a chunk.

    Args:
        pasts: positions fed before, of each stream, as `past_lengths` tells; a `PagedPast` knows all of it.
        new: positions fed now.
        chunk: length of a chunk; 0 means no chunks, every position sees every key.
        valid: `[B, 1, new]`, nonzero where a new position is not padding. Padding is hidden as key only.
    """
    if isinstance(pasts, PagedPast):
        return [pasts.mask(new)]
    seen = None
    if chunk and (torch.compiler.is_exporting() or new > chunk):  # an exported graph serves every length
        seen = _chunk_mask(new, chunk, device)
    rows = [None] * len(pasts) if valid is None else rows_of(valid.bool()[:, None], len(pasts))
    return [_with_past(_both(seen, own), past) for past, own in zip(pasts, rows, strict=True)]


def _chunk_mask(new: int, chunk: int, device: torch.device) -> Tensor:
    position = torch.arange(new, device=device)
    return (position < ((position // chunk + 1) * chunk)[:, None])[None, None]


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


def past_of(state: State | None) -> list[KeyValues] | list[PagedPast]:
    """What each stream of a batch has been fed, from the state of an attention layer; nothing without a state."""
    past = [] if state is None else state["past"]
    return past if isinstance(past, list) else [past]


def past_lengths(state: State | None) -> list[int] | PagedPast:
    """How many positions each stream of a batch has been fed; `[0]` without a state."""
    pasts = past_of(state)
    if pasts and isinstance(pasts[0], PagedPast):
        return pasts[0]
    return [past.length for past in pasts] or [0]


def past_positions(pasts: list[int] | PagedPast, new: int, rows: int, device: torch.device) -> Tensor:
    """The positions of what is fed now, `[1 or rows, new]`; the streams share the rows of a batch evenly."""
    if isinstance(pasts, PagedPast):
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
        attended.append(past.attend(query, key, value, mask))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


class SelfAttention(nn.Module):
    """The projections of a multi-head self-attention layer. State: see `no_past`."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim), nn.Dropout(dropout))
        self._joint: tuple[Tensor, Tensor | None] | None = None

    def init_own_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return no_past(batch_size, self.heads, self.head_dim, device, dtype)

    def join_projections(self) -> None:
        """Lay the three projections' weights side by side, so that they are one product of matrices from now on."""
        layers = (self.to_q, self.to_k, self.to_v)
        weight, bias = (
            None if parts[0] is None else torch.cat([part.data for part in parts])
            for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers])
        )
        for index, layer in enumerate(layers):
            layer.weight.data = weight.chunk(3)[index]
            if bias is not None:
                layer.bias.data = bias.chunk(3)[index]
        self._joint = weight, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        self._joint = None  # the weights are about to be others
        return super()._apply(fn, recurse)

    def project(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, `[B, heads, T, d]` each, of `x [B, T, dim]`."""
        if self._joint is None:
            projected = [layer(x) for layer in (self.to_q, self.to_k, self.to_v)]
        else:
            projected = F.linear(x, *self._joint).chunk(3, dim=2)
        return [split_heads(part, self.heads) for part in projected]
