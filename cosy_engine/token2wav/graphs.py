"""CUDA graphs: what a function starts on a GPU, started again all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_T = TypeVar("_T")


def captured(run: Callable[[], _T], device: torch.device, *, pool: tuple[int, int] | None = None) -> Callable[[], _T]:
    """`run` as a CUDA graph. It reads the same tensors each time, and its results are the same tensors each time.

    Args:
        pool: memory of a `torch.cuda.graph_pool_handle` that graphs share which run one after the other; each keeps
            for itself only its results.
    """
    with torch.cuda.device(device):
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = run()

    def replay() -> _T:
        graph.replay()
        return results

    return replay


def filled_up(size: int, sizes: Sequence[int]) -> int:
    """The next of a few sizes that there are graphs for; itself if it is beyond them."""
    return next((usual for usual in sizes if usual >= size), size)


def uncaptured(run: Callable[[], _T], device: torch.device) -> Callable[[], _T]:
    """`run` as it is."""
    return run
