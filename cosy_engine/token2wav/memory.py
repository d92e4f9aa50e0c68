"""How much memory the streams may keep between their chunks."""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch


def default_voice_cache(device: torch.device) -> int:
    """An eighth of the GPU's memory, or 1 GiB: bytes."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 2**30


def default_stream_memory(device: torch.device) -> int:
    """Half of the GPU's free memory, or a quarter of the machine's: bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


class StreamMemory:
    """One budget, in bytes, for all streams. A stream that is dropped gives back what it held."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: WeakKeyDictionary[object, int] = WeakKeyDictionary()

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return sum(self._held.values())

    def keep(self, stream: object, size: int) -> bool:
        """Whether a stream may keep so many bytes; if not, it has to let go of all it has."""
        self._held.pop(stream, None)
        if self.held + size > self._budget:
            return False
        self._held[stream] = size
        return True
