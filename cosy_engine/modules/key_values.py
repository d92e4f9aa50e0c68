"""The memory of an attention layer."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_ROOM = 128
_GROWTH = random.Random(0)


class KeyValues:
    """Keys and values of all positions so far, `[B, heads, length, d]` each, in buffers that have room for more.

    New positions are written into the room; what is there is copied only when a buffer is full, and the next one is
    about half as large again: by chance more or less, or all layers would move with the same chunk, which would be
    late. The first one is exact: what a voice remembers of its prompt takes no more than it needs. `fork` shares the
    buffers, which is safe: a fork has no room, so it moves out when it grows, and whatever the original appends lies
    behind the fork's end.

    Attributes:
        length: positions so far.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.length = self._capacity = keys.shape[2]

    @classmethod
    def empty(cls, batch_size: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> KeyValues:
        """Before the first position."""
        none = torch.empty(batch_size, heads, 0, head_dim, device=device, dtype=dtype)
        return cls(none, none)

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room included."""
        return self._keys.nbytes + self._values.nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        """More positions, `[B, heads, new, d]` each."""
        if torch.compiler.is_exporting():  # a graph has no memory: what it remembers are its outputs
            self._keys, self._values = torch.cat([self._keys, key], dim=2), torch.cat([self._values, value], dim=2)
            self.length = self._capacity = self._keys.shape[2]
            return
        start, end = self.length, self.length + key.shape[2]
        if end > self._capacity:
            self._capacity = max(end, start + _room(start)) if start else end
            self._keys, self._values = self._moved(self._keys), self._moved(self._values)
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value
        self.length = end

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention to the past and to the new positions, which are appended; all are `[B, heads, new, d]`."""
        keys, values = self.extend(key, value)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with the new ones `[B, heads, new, d]` at the end."""
        self.append(key, value)
        return self.keys, self.values

    def fork(self) -> KeyValues:
        """A copy that can go on independently."""
        return KeyValues(self.keys, self.values)

    def to(self, device: torch.device) -> KeyValues:
        """A copy on another device."""
        return KeyValues(self.keys.to(device), self.values.to(device))

    def _moved(self, old: Tensor) -> Tensor:
        batch, heads, _, head_dim = old.shape
        moved = old.new_empty(batch, heads, self._capacity, head_dim)
        moved[:, :, : self.length] = old[:, :, : self.length]
        return moved


def _room(length: int) -> int:
    """How much to have behind so many positions."""
    if torch.compiler.is_compiling():  # chance would cut the compiled function into pieces
        return max(length // 2, _LEAST_ROOM)
    return max(int(length * _GROWTH.uniform(0.25, 0.75)), _LEAST_ROOM)
