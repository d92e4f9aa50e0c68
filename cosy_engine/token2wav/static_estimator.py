"""The flow's estimator at a few fixed shapes, so that an Euler step of many streams is one replay of a CUDA graph.

An estimator call is about a thousand small kernels, and on a GPU starting them takes longer than running them. A graph
starts them all at once but has fixed shapes and addresses. So batches and chunks are filled up to the next of a few
sizes, and what each stream remembers is copied into buffers as long as the longest past needs; masks hide the rest.
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

from cosy_engine.modules.attention import PaddedPast, SelfAttention
from cosy_engine.modules.flow_matching import MAX_FRAMES, CausalConditionalCFM, EstimatorInputs
from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.streaming import State, init_state
from cosy_engine.token2wav.graphs import captured, uncaptured

logger = logging.getLogger(__name__)

_FRAMES = (50, 100, 200, 400)  # of the hops of 25, 50 and 100 tokens, and of prompts
_STREAMS = (1, 2, 4, 8, 16, 32)
_PASTS = (512, 1024, 2048, 4096)  # frames; longer ones run without a graph
_ALIGNMENT = 64  # positions; attention kernels with a mask want its rows aligned


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

    def keys_values_size(self, rows: int) -> int:
        """Numbers that one position of so many rows takes."""
        return len(self.pasts) * 2 * rows * self.heads * self.head_dim

    def state(self, pasts: Sequence[PaddedPast], tails: Tensor, counts: Tensor) -> State:
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


class StreamSlab:
    """What the estimator remembers of one stream at one Euler step: keys and values `[layers, 2, rows, heads, n, d]`.

    They lie in parts one after the other. The last part is the stream's own and has room for more; the others are
    shared with whom it was forked from, as the prompt's is with the voice.

    Attributes:
        tails: `[rows, tail_size]`.
        length: positions in all parts.
    """

    def __init__(self, shared: Sequence[Tensor], own: Tensor, tails: Tensor) -> None:
        self._shared, self._own, self.tails = tuple(shared), own, tails
        self._own_length = own.shape[4]
        self.length = sum(part.shape[4] for part in (*shared, own))

    @classmethod
    def empty(cls, layout: Layout, rows: int, device: torch.device, dtype: torch.dtype, *, past: int = 0) -> StreamSlab:
        """Before the first position, or after `past` zeros."""
        shape = (len(layout.pasts), 2, rows, layout.heads, past, layout.head_dim)
        options = {"device": device, "dtype": dtype}
        return cls((), torch.zeros(shape, **options), torch.zeros(rows, layout.tail_size, **options))

    @property
    def nbytes(self) -> int:
        """Bytes of its own part, room included, and of the tails."""
        return self._own.nbytes + self.tails.nbytes

    def append(self, keys_values: Tensor, tails: Tensor) -> None:
        """More positions, which are copied, and the tails after them."""
        start, end = self._own_length, self._own_length + keys_values.shape[4]
        if end > self._own.shape[4]:
            grown = self._own.new_empty(*self._own.shape[:4], max(end, start + start // 2), self._own.shape[5])
            grown[..., :start, :] = self._own[..., :start, :]
            self._own = grown
        self._own[..., start:end, :] = keys_values
        self._own_length = end
        self.length += keys_values.shape[4]
        self.tails = tails

    def write(self, buffer: Tensor) -> None:
        """Copy all positions to the start of `buffer [layers, 2, rows, heads, at least length, d]`."""
        start = 0
        for part in self._parts():
            buffer[..., start : start + part.shape[4], :] = part
            start += part.shape[4]

    def fork(self) -> StreamSlab:
        """A copy that can go on independently. It shares what is there, and starts a part of its own."""
        return StreamSlab(self._parts(), self._own[..., :0, :].clone(), self.tails)

    def to(self, device: torch.device) -> StreamSlab:
        """A copy on another device; itself if it is there."""
        if self.tails.device == device:
            return self
        return StreamSlab((), torch.cat(self._parts(), dim=4).to(device), self.tails.to(device))

    def _parts(self) -> tuple[Tensor, ...]:
        return (*self._shared, self._own[..., : self._own_length, :])


@dataclass
class _Buffers:
    """Inputs of a step at one shape, two rows for each stream, and room for `capacity` positions of their pasts."""

    x: Tensor
    mu: Tensor
    cond: Tensor
    t: Tensor
    spks: Tensor
    keys_values: Tensor
    tails: Tensor
    lengths: Tensor
    counts: Tensor
    capacity: int
    given: list[Tensor] = field(default_factory=list)  # the streams' mu, which is filled in; all Euler steps have it


class StaticEstimator(nn.Module):
    """Takes the place of `estimator` in the flow: streams run at fixed shapes, whole utterances as they are.

    Args:
        positions: of all streams of a batch together, for which there is one buffer; a larger batch is run in parts.
        graphs: capture each shape as a CUDA graph at its first use.
        past: how the attention layers reach a past that is filled up. With `PaddedPast` room costs as much as a past,
            so there are several sizes of it; with another kind there is one.
    """

    batches_streams = True

    def __init__(
        self, estimator: nn.Module, *, positions: int, graphs: bool, past: type[PaddedPast] = PaddedPast
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.time_features = estimator.time_features
        self.static_chunk_size = estimator.static_chunk_size
        self._layout = Layout.of(estimator)
        weight = next(estimator.parameters())
        self._positions, self._past = positions, past
        self._keys_values = weight.new_zeros(positions * self._layout.keys_values_size(rows=2))
        self._capture = captured if graphs else uncaptured
        self._steps: dict[tuple[int, int, int], tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]] = {}

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return {"slab": StreamSlab.empty(self._layout, batch_size, device, dtype)}

    def forward(self, *arguments: Tensor | None, **options: bool | State | None) -> Tensor:
        """The velocity of whole utterances; see the estimator's own `forward`."""
        return self.estimator(*arguments, **options)

    def frames(self, frames: int) -> int:
        """How many frames a chunk of so many is filled up to."""
        return _filled_up(frames, _FRAMES)

    def warm_up(self, streams: int) -> None:
        """Capture what prompts and streams of usual lengths need, up to so many in a batch."""
        weight = next(self.estimator.parameters())
        t = self.time_features(torch.zeros(1, device=weight.device)).expand(2, -1)
        sizes = _STREAMS[: 1 + _STREAMS.index(_filled_up(streams, _STREAMS))]
        pasts = _PASTS[:2] if self._past is PaddedPast else (0,)
        for size, frames, past in (*product(sizes, _FRAMES[:3], pasts), *product(sizes[:3], _FRAMES[3:], pasts[:1])):
            mel, spks = weight.new_zeros(2, 80, frames), weight.new_zeros(2, 80)
            empty = partial(StreamSlab.empty, self._layout, 2, weight.device, weight.dtype, past=past)
            self.velocities([EstimatorInputs(mel, None, mel, t, spks, mel, {"slab": empty()}) for _ in range(size)])

    def velocities(self, batch: Sequence[EstimatorInputs]) -> list[Tensor]:
        """The velocity `[2, 80, T]` of each stream."""
        slabs = [own.state["slab"] for own in batch]
        frames = self.frames(max(own.x.shape[2] for own in batch))
        streams, longest = _filled_up(len(batch), _STREAMS), max(slab.length for slab in slabs)
        capacity = self._capacity(streams, frames, longest)
        if capacity is None and len(batch) > 1:
            half = len(batch) // 2
            return self.velocities(batch[:half]) + self.velocities(batch[half:])
        buffers, step = self._step(streams, frames, capacity, longest, batch[0])
        self._fill(buffers, batch, slabs)
        velocity, tails = (result.clone() for result in step())
        new = slice(buffers.capacity, buffers.capacity + frames)
        results = []
        for index, (own, slab) in enumerate(zip(batch, slabs, strict=True)):
            rows, count = slice(2 * index, 2 * index + 2), own.x.shape[2]
            slab.append(buffers.keys_values[:, :, rows, :, new][..., :count, :], tails[rows])
            results.append(velocity[rows, :, :count])
        return results

    def _capacity(self, streams: int, frames: int, longest: int) -> int | None:
        """Positions that each stream of a batch gets for its past in the one buffer; None: there is no room."""
        most = self._positions // streams - _aligned(frames)
        sizes = _PASTS if self._past is PaddedPast else (min(most, MAX_FRAMES) // _ALIGNMENT * _ALIGNMENT,)
        return next((size for size in sizes if longest <= size <= most), None)

    def _step(
        self, streams: int, frames: int, capacity: int | None, longest: int, like: EstimatorInputs
    ) -> tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]:
        """Buffers and what runs on them; captured, and kept, unless the shape is unusual."""
        key = streams, frames, capacity
        if key in self._steps:
            return self._steps[key]
        usual = frames in _FRAMES and capacity is not None
        buffers = self._room_for(streams, frames, capacity if usual else longest, like, shared=usual)

        def run() -> tuple[Tensor, Tensor]:
            return self._run(buffers)

        made = buffers, self._capture(run, buffers.x.device) if usual else run
        if usual:
            self._steps[key] = made
        return made

    def _room_for(self, streams: int, frames: int, capacity: int, like: EstimatorInputs, *, shared: bool) -> _Buffers:
        rows, layout = 2 * streams, self._layout
        width = capacity + _aligned(frames)
        size = layout.keys_values_size(rows) * width
        keys_values = self._keys_values[:size] if shared else self._keys_values.new_zeros(size)

        def zeros(*shape: int, dtype: torch.dtype = like.mu.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=like.mu.device)

        return _Buffers(
            x=zeros(rows, like.x.shape[1], frames),
            mu=zeros(rows, like.mu.shape[1], frames),
            cond=zeros(rows, like.cond.shape[1], frames),
            t=zeros(rows, like.t.shape[1], dtype=like.t.dtype),
            spks=zeros(rows, like.spks.shape[1]),
            keys_values=keys_values.view(len(layout.pasts), 2, rows, layout.heads, width, layout.head_dim),
            tails=zeros(rows, layout.tail_size),
            lengths=zeros(rows, dtype=torch.int64),
            counts=zeros(rows, dtype=torch.int64) + frames,  # attention to nothing is not a number, and would stay
            capacity=capacity,
        )

    def _fill(self, buffers: _Buffers, batch: Sequence[EstimatorInputs], slabs: Sequence[StreamSlab]) -> None:
        rows, frames = buffers.x.shape[0], buffers.x.shape[2]
        used = 2 * len(batch)
        counts = torch.tensor([own.x.shape[2] for own in batch for _ in range(2)] + (rows - used) * [frames])
        buffers.counts.copy_(counts, non_blocking=True)
        lengths = torch.tensor([slab.length for slab in slabs for _ in range(2)] + (rows - used) * [0])
        buffers.lengths.copy_(lengths, non_blocking=True)
        buffers.x[:used] = torch.cat([_padded(own.x, frames) for own in batch])
        buffers.t[:used] = torch.cat([own.t for own in batch])
        given = [own.mu for own in batch]
        if list(map(id, given)) != list(map(id, buffers.given)):
            buffers.given = []  # until all is there
            buffers.mu[:used] = torch.cat([_padded(own.mu, frames) for own in batch])
            buffers.cond[:used] = torch.cat([_padded(own.cond, frames) for own in batch])
            buffers.spks[:used] = torch.cat([own.spks for own in batch])
            buffers.given = given
        buffers.tails[:used] = torch.cat([slab.tails for slab in slabs])
        for index, slab in enumerate(slabs):
            slab.write(buffers.keys_values[:, :, 2 * index : 2 * index + 2])

    def _run(self, buffers: _Buffers) -> tuple[Tensor, Tensor]:
        """Velocity and the tails after it; the new keys and values are in the buffer, behind the past."""
        pasts = [
            self._past(keys, values, buffers.lengths, buffers.counts, buffers.capacity, self.static_chunk_size)
            for keys, values in buffers.keys_values
        ]
        state = self._layout.state(pasts, buffers.tails, buffers.counts)
        velocity = self.estimator(
            buffers.x, None, buffers.mu, buffers.t, buffers.spks, buffers.cond, streaming=True, state=state
        )
        return velocity, self._layout.tails_of(state)


def use_graphs(decoder: CausalConditionalCFM, streams: int) -> None:
    """Put the estimator of a model on a GPU at static shapes, with one buffer for so many streams of 20 seconds, or as
    much of that as an eighth of the GPU's memory holds."""
    estimator = decoder.estimator
    weight = next(estimator.parameters())
    size = Layout.of(estimator).keys_values_size(rows=2) * weight.itemsize
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    positions = min(streams * (_aligned(_FRAMES[2]) + _PASTS[1]), memory // 8 // size)
    for layer in estimator.modules():
        if isinstance(layer, SelfAttention):
            layer.join_projections()
    decoder.estimator = StaticEstimator(estimator, positions=positions, graphs=True, past=_fastest(estimator))


def _fastest(estimator: nn.Module) -> type[PaddedPast]:
    """The kernel for attention to such a past, if it can be used on the estimator's GPU and gives the same."""
    layout, weight = Layout.of(estimator), next(estimator.parameters())
    try:
        from cosy_engine.token2wav.padded_attention import TightPast, agrees

        if agrees(weight.device, weight.dtype, layout.heads, layout.head_dim):
            return TightPast
        reason = "its values are not those of PyTorch's"
    except Exception as error:  # no Triton, or none for this GPU, or no compiler
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)  # fails too if the kernel broke the GPU's context
        reason = f"{type(error).__name__}: {error}"
    logger.warning("The flow's attention kernel is not used, chunks late in a stream take longer: %s", reason)
    return PaddedPast


def _filled_up(size: int, sizes: Sequence[int]) -> int:
    return next((usual for usual in sizes if usual >= size), size)


def _padded(mel: Tensor, frames: int) -> Tensor:
    return mel if mel.shape[2] == frames else F.pad(mel, (0, frames - mel.shape[2]))


def _aligned(positions: int) -> int:
    return -(-positions // _ALIGNMENT) * _ALIGNMENT


def _leaves(state: State, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor | KeyValues]]:
    leaves = []
    for name, value in state.items():
        leaves += _leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]
    return leaves


def _put(state: State, path: Sequence[str], leaf: Tensor | PaddedPast) -> None:
    *parents, name = path
    for parent in parents:
        state = state.setdefault(parent, {})
    state[name] = leaf


def _get(state: State, path: Sequence[str]) -> Tensor:
    for name in path:
        state = state[name]
    return state
