"""How much memory the streams may keep between their chunks."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakKeyDictionary, WeakMethod

import torch

from cosy_engine.token2wav.pages import PagePool


def default_voice_cache(device: torch.device) -> int:
    """An eighth of the GPU's memory, or 1 GiB: bytes."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 2**30


def default_stream_memory(device: torch.device, others: float = 0.0) -> int:
    """Half of the GPU's free memory, or a quarter of the machine's: bytes.

    Args:
        others: share of the GPU's memory that somebody else is about to take; a fifth of the rest stays free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, min(free // 2, int(0.8 * (free - others * total))))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


class Stream(Protocol):
    """Who keeps something between chunks.

    Attributes:
        in_pages: what it keeps is in the pages of the estimator's pool.
    """

    in_pages: bool

    def forget(self) -> bool:
        """Let go of it; False if a chunk is being made."""
        ...


class StreamMemory:
    """One budget, in bytes, for all streams. A stream that is dropped gives back what it held."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: WeakKeyDictionary[Stream, int] = WeakKeyDictionary()

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return sum(self._held.values())

    def keep(self, stream: Stream, size: int) -> bool:
        """Whether a stream may keep so many bytes; if not, it has to let go of all it has."""
        self._held.pop(stream, None)
        if self.held + size > self._budget:
            return False
        self._held[stream] = size
        return True


class PooledMemory(StreamMemory):
    """The same where all is in the pages of a pool: everyone keeps what he has until others need the pages."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool.pages.nbytes)
        pool.reclaimers.append(WeakMethod(self._reclaim))

    def keep(self, stream: Stream, size: int) -> bool:
        """As `StreamMemory.keep`; what is not in the pool would be memory beside it."""
        return super().keep(stream, size if stream.in_pages else 0) and stream.in_pages

    def _reclaim(self) -> bool:
        """The stream that was served last can wait for longest."""
        for stream in reversed(list(self._held)):
            if stream.forget():
                del self._held[stream]
                return True
        return False
