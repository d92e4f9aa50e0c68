"""The backbone's step for one position as CUDA graphs, which start its hundreds of small kernels at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from cosy_engine.modules.qwen2_lm import KVCache, Qwen2Encoder
from cosy_engine.token2wav.graphs import captured, uncaptured

CAPACITIES = (256, 512, 1024, 2048)
"""Positions for which there are graphs; 2048 are more than a minute of speech."""


class GraphedStep:
    """A `Qwen2Encoder.single_step`. One thread may use it at a time.

    A graph always works on the same memory. So there is one cache a graph, and the keys and values of a sequence are
    copied there when it is its turn. Caches that have become larger than the largest graph are fed as ever.

    Args:
        encoder: on its device. Where that has no CUDA, the graphs' steps are run as they are, with the same results.
    """

    def __init__(self, encoder: Qwen2Encoder, capacities: Iterable[int] = CAPACITIES) -> None:
        self._encoder = encoder
        with torch.inference_mode():
            self._graphs = {capacity: _Graph(encoder, capacity) for capacity in capacities}

    def __call__(self, embedding: Tensor, cache: KVCache) -> Tensor:
        """Hidden state [1, 1, D] for `embedding` [1, 1, D], to be used before the next call."""
        self._encoder.reserve(cache, cache.length + 1, embedding)
        graph = self._graphs.get(cache.capacity)
        return self._encoder.extend(embedding, cache) if graph is None else graph.run(embedding, cache)


class _Graph:
    """A recorded step, what it works on, and which sequence has its keys and values there."""

    def __init__(self, encoder: Qwen2Encoder, capacity: int) -> None:
        like = encoder.model.model.norm.weight
        self._embedding = like.new_zeros(1, 1, len(like))
        self._position = torch.zeros(1, dtype=torch.long, device=like.device)
        self._memory = KVCache()
        encoder.reserve(self._memory, capacity, self._embedding)
        capture = captured if like.is_cuda else uncaptured
        self._step = capture(lambda: encoder.step(self._embedding, self._position, self._memory), like.device)
        self._loaded: tuple[weakref.ref[KVCache] | None, int] = None, 0  # whose positions, and how many of them

    def run(self, embedding: Tensor, cache: KVCache) -> Tensor:
        whose, count = self._loaded
        if whose is None or whose() is not cache or count != cache.length:
            self._copy(cache, self._memory, slice(0, cache.length))
        self._embedding.copy_(embedding)
        self._position.fill_(cache.length)
        hidden = self._step()
        self._copy(self._memory, cache, slice(cache.length, cache.length + 1))
        cache.length += 1
        self._loaded = weakref.ref(cache), cache.length
        return hidden

    @staticmethod
    def _copy(source: KVCache, target: KVCache, positions: slice) -> None:
        target.keys[..., positions, :] = source.keys[..., positions, :]
        target.values[..., positions, :] = source.values[..., positions, :]
