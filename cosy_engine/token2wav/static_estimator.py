"""The flow's estimator at a few fixed shapes, so that an Euler step of many streams is one replay of a CUDA graph.

An estimator call is about a thousand small kernels, and on a GPU starting them takes longer than running them. A graph
starts them all at once but has fixed shapes and addresses. So batches and chunks are filled up to the next of a few
sizes. What streams remember lies in the pages of one pool, and a graph is told which ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.errors import BackendUnavailableError
from cosy_engine.modules.attention import PagedPast, SelfAttention
from cosy_engine.modules.flow_matching import MAX_FRAMES, CausalConditionalCFM, EstimatorInputs
from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.streaming import State, init_state
from cosy_engine.token2wav.graphs import captured, filled_up, uncaptured
from cosy_engine.token2wav.memory import default_stream_memory
from cosy_engine.token2wav.pages import PAGE, PagedStream, PagePool

logger = logging.getLogger(__name__)

_FRAMES = (50, 100, 150, 200, 400)  # of the hops of up to 25, 50 and 100 tokens, of last ones, of prompts
_STREAMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_PASTS = (512, 1024, 2048, 4096, MAX_FRAMES)  # frames


@dataclass(frozen=True)
class Layout:
    """Where an estimator's state lies in two tensors.

    Attributes:
        pasts: paths of the attention layers.
        tails: paths of the convolutions' last inputs, their shapes without the rows, and how many frames they are.
        heads, head_dim: of every attention layer.
    """

    pasts: tuple[tuple[str, ...], ...]
    tails: tuple[tuple[tuple[str, ...], tuple[int, int], int], ...]
    heads: int
    head_dim: int

    @classmethod
    def of(cls, estimator: nn.Module) -> Layout:
        leaves = list(_leaves(init_state(estimator, 1, torch.device("meta"), torch.float32)))
        pasts = [(path, leaf) for path, leaf in leaves if isinstance(leaf, KeyValues)]
        tails = tuple(
            (path, tuple(leaf.shape[1:]), estimator.get_submodule(".".join(path[:-1])).kernel_size[0] - 1)
            for path, leaf in leaves
            if isinstance(leaf, Tensor)
        )
        _, heads, _, head_dim = pasts[0][1].keys.shape
        return cls(tuple(path for path, _ in pasts), tails, heads, head_dim)

    @property
    def tail_size(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.tails)

    def state(self, pasts: Sequence[PagedPast], tails: Tensor, counts: Tensor) -> State:
        """The state as the estimator takes it; `tails [rows, tail_size]`, `counts [rows]` of frames without padding."""
        state: State = {}
        for path, past in zip(self.pasts, pasts, strict=True):
            _put(state, path, past)
        sizes = [math.prod(shape) for _, shape, _ in self.tails]
        next_tails = {frames: counts[:, None] + torch.arange(frames, device=counts.device) for *_, frames in self.tails}
        for (path, shape, frames), tail in zip(self.tails, tails.split(sizes, dim=1), strict=True):
            _put(state, path, tail.unflatten(1, shape))
            _put(state, (*path[:-1], "next_tail"), next_tails[frames])
        return state

    def tails_of(self, state: State) -> Tensor:
        """The tails of a state, `[rows, tail_size]`."""
        return torch.cat([_get(state, path).flatten(1) for path, *_ in self.tails], dim=1)


@dataclass
class _Buffers:
    """Inputs of a step at one shape, two rows for each stream; see `PagedPast` for the last ones."""

    x: Tensor
    mu: Tensor
    cond: Tensor
    t: Tensor
    spks: Tensor
    tails: Tensor
    table: Tensor
    steps: Tensor
    lengths: Tensor
    counts: Tensor
    given: list[Tensor] = field(default_factory=list)  # the streams' mu, which is filled in; a chunk's steps share it


class StaticEstimator(nn.Module):
    """Takes the place of `estimator` in the flow: streams run at fixed shapes, whole utterances as they are.

    Args:
        steps: Euler steps of a stream.
        memory: bytes that streams and voices may take together.
        graphs: capture each shape as a CUDA graph at its first use.
        past: how the attention layers reach the pages. With `PagedPast` the longest past in a batch costs as much as if
            all had it, so there are graphs for several of them; with another kind there is one.
    """

    batches_streams = True

    def __init__(
        self, estimator: nn.Module, *, steps: int, memory: int, graphs: bool, past: type[PagedPast] = PagedPast
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.time_features = estimator.time_features
        self.static_chunk_size = estimator.static_chunk_size
        self._layout = layout = Layout.of(estimator)
        weight = next(estimator.parameters())
        shape = (steps, len(layout.pasts), layout.heads, layout.head_dim)
        self.pool = PagePool(shape, memory, weight.device, weight.dtype)
        self._past = past
        self._capture = partial(captured, pool=torch.cuda.graph_pool_handle()) if graphs else uncaptured
        self._steps: dict[tuple[int, int, int], tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]] = {}

    def new_stream(self, steps: int) -> PagedStream:
        """What is remembered before the first position, at so many Euler steps."""
        tails = self.pool.pages.new_zeros(2, self._layout.tail_size)
        return PagedStream(self.pool, [], 0, steps * [tails])

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The estimator's own, for a stream that has no place in the pool."""
        return init_state(self.estimator, batch_size, device, dtype)

    def forward(self, *arguments: Tensor | None, **options: bool | State | None) -> Tensor:
        """The velocity of whole utterances, and of such streams; see the estimator's own `forward`."""
        return self.estimator(*arguments, **options)

    def frames(self, frames: int) -> int:
        """How many frames a chunk of so many is filled up to."""
        return filled_up(frames, _FRAMES)

    def warm_up(self, streams: int) -> None:
        """Capture what prompts and streams of usual lengths need, up to so many in a batch."""
        weight = next(self.estimator.parameters())
        t = self.time_features(torch.zeros(1, device=weight.device)).expand(2, -1)
        sizes = _STREAMS[: 1 + _STREAMS.index(filled_up(streams, _STREAMS))]
        pasts = _PASTS[:2] if self._past is PagedPast else _PASTS[-1:]
        for size, frames, past in (*product(sizes, _FRAMES[:4], pasts), *product(sizes[:4], _FRAMES[4:], pasts[:1])):
            mel, spks = weight.new_zeros(2, 80, frames), weight.new_zeros(2, 80)
            buffers, step = self._step(size, frames, past, EstimatorInputs(mel, None, mel, t, spks, mel, None))
            step()

    def velocities(self, batch: Sequence[EstimatorInputs]) -> list[Tensor]:
        """The velocity `[2, 80, T]` of each stream, which has room for its new positions."""
        frames = self.frames(max(own.x.shape[2] for own in batch))
        longest = max(own.state["stream"].length for own in batch)
        buffers, step = self._step(filled_up(len(batch), _STREAMS), frames, longest, batch[0])
        self._fill(buffers, batch)
        velocity, tails = (result.clone() for result in step())
        results = []
        for index, own in enumerate(batch):
            rows, count = slice(2 * index, 2 * index + 2), own.x.shape[2]
            stream, number = own.state["stream"], own.state["step"]
            stream.tails[number] = tails[rows]
            if number == len(stream.tails) - 1:
                stream.length += count
            results.append(velocity[rows, :, :count])
        return results

    def _step(
        self, streams: int, frames: int, past: int, like: EstimatorInputs
    ) -> tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]:
        """Buffers and what runs on them; captured, and kept, unless there are more frames than usual."""
        past = filled_up(past, _PASTS) if self._past is PagedPast else _PASTS[-1]
        key = streams, frames, past
        if key in self._steps:
            return self._steps[key]
        buffers = self._inputs(streams, frames, past, like)

        def run() -> tuple[Tensor, Tensor]:
            return self._run(buffers)

        made = buffers, self._capture(run, buffers.x.device) if frames in _FRAMES else run
        if frames in _FRAMES:
            self._steps[key] = made
        return made

    def _inputs(self, streams: int, frames: int, past: int, like: EstimatorInputs) -> _Buffers:
        rows = 2 * streams

        def zeros(*shape: int, dtype: torch.dtype = like.mu.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=like.mu.device)

        return _Buffers(
            x=zeros(rows, like.x.shape[1], frames),
            mu=zeros(rows, like.mu.shape[1], frames),
            cond=zeros(rows, like.cond.shape[1], frames),
            t=zeros(rows, like.t.shape[1], dtype=like.t.dtype),
            spks=zeros(rows, like.spks.shape[1]),
            tails=zeros(rows, self._layout.tail_size),
            table=zeros(streams, -(-(past + frames) // PAGE), dtype=torch.int32),
            steps=zeros(streams, dtype=torch.int32),
            lengths=zeros(rows, dtype=torch.int64),
            counts=zeros(rows, dtype=torch.int64) + frames,  # attention to nothing is not a number, and would stay
        )

    def _fill(self, buffers: _Buffers, batch: Sequence[EstimatorInputs]) -> None:
        used, frames = 2 * len(batch), buffers.x.shape[2]
        given = [own.mu for own in batch]
        if list(map(id, given)) != list(map(id, buffers.given)):
            buffers.given = []  # until all is there
            buffers.mu[:used] = _filled_up_mels([own.mu for own in batch], frames)
            buffers.cond[:used] = _filled_up_mels([own.cond for own in batch], frames)
            buffers.spks[:used] = torch.cat([own.spks for own in batch])
            self._fill_places(buffers, batch)
            buffers.given = given
        buffers.x[:used] = _filled_up_mels([own.x for own in batch], frames)
        buffers.t[:used] = torch.cat([own.t for own in batch])
        buffers.tails[:used] = torch.cat([own.state["stream"].tails[own.state["step"]] for own in batch])
        steps = torch.tensor([own.state["step"] for own in batch], dtype=torch.int32)
        buffers.steps[: len(batch)].copy_(steps, non_blocking=True)

    def _fill_places(self, buffers: _Buffers, batch: Sequence[EstimatorInputs]) -> None:
        """Where the streams' positions are, and how many; the rows that fill up have no page."""
        table = torch.zeros(buffers.table.shape, dtype=torch.int32)
        lengths, counts = torch.zeros(len(table), dtype=torch.int64), torch.full((len(table),), buffers.x.shape[2])
        for index, own in enumerate(batch):
            stream = own.state["stream"]
            pages = stream.pages[: table.shape[1]]  # there may be room for later chunks, too
            table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            lengths[index], counts[index] = stream.length, own.x.shape[2]
        buffers.table.copy_(table, non_blocking=True)
        buffers.lengths.copy_(lengths.repeat_interleave(2), non_blocking=True)
        buffers.counts.copy_(counts.repeat_interleave(2), non_blocking=True)

    def _run(self, buffers: _Buffers) -> tuple[Tensor, Tensor]:
        """Velocity and the tails after it; the new keys and values are in the pages."""
        places = buffers.table, buffers.steps, buffers.lengths, buffers.counts, self.static_chunk_size
        pasts = [self._past(pages, *places) for pages in self.pool.pages.unbind(2)]
        state = self._layout.state(pasts, buffers.tails, buffers.counts)
        velocity = self.estimator(
            buffers.x, None, buffers.mu, buffers.t, buffers.spks, buffers.cond, streaming=True, state=state
        )
        return velocity, self._layout.tails_of(state)


def use_graphs(decoder: CausalConditionalCFM, memory: int | None = None) -> None:
    """Put the estimator of a model on a GPU at static shapes.

    Args:
        memory: bytes for what streams and voices remember; by default half of what is free.

    Raises:
        BackendUnavailableError: there is not as much.
    """
    estimator = decoder.estimator
    device = next(estimator.parameters()).device
    memory = default_stream_memory(device) if memory is None else memory
    past = _fastest(estimator)
    for layer in estimator.modules():
        if isinstance(layer, SelfAttention):
            layer.join_projections()
    try:
        decoder.estimator = StaticEstimator(estimator, steps=decoder.n_timesteps, memory=memory, graphs=True, past=past)
    except torch.OutOfMemoryError as error:
        raise BackendUnavailableError(
            f"The GPU has no {memory / 2**20:.0f} MiB left for what streams remember; set COSY_STREAM_MEMORY_MB lower.",
            param="stream_memory_mb",
        ) from error


def _fastest(estimator: nn.Module) -> type[PagedPast]:
    """The kernel for attention to such a past, if it can be used on the estimator's GPU and gives the same."""
    layout, weight = Layout.of(estimator), next(estimator.parameters())
    try:
        from cosy_engine.token2wav.paged_attention import KernelPast, agrees

        if agrees(weight.device, weight.dtype, layout.heads, layout.head_dim):
            return KernelPast
        reason = "its values are not those of PyTorch's"
    except Exception as error:  # no Triton, or none for this GPU, or no compiler
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)  # fails too if the kernel broke the GPU's context
        reason = f"{type(error).__name__}: {error}"
    logger.warning("The flow's attention kernel is not used, chunks late in a stream take longer: %s", reason)
    return PagedPast


def _filled_up_mels(mels: Sequence[Tensor], frames: int) -> Tensor:
    """All rows, `[rows, 80, frames]`."""
    if len({mel.shape[2] for mel in mels}) > 1:
        mels = [F.pad(mel, (0, frames - mel.shape[2])) for mel in mels]
    joined = torch.cat(list(mels))
    return F.pad(joined, (0, frames - joined.shape[2]))


def _leaves(state: State, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor | KeyValues]]:
    leaves = []
    for name, value in state.items():
        leaves += _leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]
    return leaves


def _put(state: State, path: Sequence[str], leaf: Tensor | PagedPast) -> None:
    *parents, name = path
    for parent in parents:
        state = state.setdefault(parent, {})
    state[name] = leaf


def _get(state: State, path: Sequence[str]) -> Tensor:
    for name in path:
        state = state[name]
    return state
