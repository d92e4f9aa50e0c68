"""The vocoder's usual chunks as CUDA graphs, so that a chunk of many streams is one replay.

A chunk is about a thousand small kernels, and on a GPU starting them takes longer than running them. So there is a
graph for each usual number of frames and a few numbers of rows, up to which batches are filled up. Once a stream's
first chunk is done its state has one form, whatever the chunks were, and lies flat in a few tensors that are quickly
put together. Last chunks are filled up with frames to a usual number; the layers are told where each row ends.

What is unusual runs as it is: other numbers of frames, first chunks that are also last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import islice
from math import prod
from operator import getitem

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.modules.source import SourceModule
from cosy_engine.modules.streaming import Leaf, State, fork_state, map_state, stack_states, unstack_state
from cosy_engine.modules.streaming_layers import STFT, InverseSTFT, StreamingConv1d, StreamingConvTranspose1d
from cosy_engine.token2wav.graphs import captured, filled_up, uncaptured
from cosy_engine.token2wav.hops import Pace, hops
from cosy_engine.token2wav.session import first_tokens, tokens_held_back
from cosy_engine.token2wav.work import form_of_chunk, vocode_alike

logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 16, 32)
_MOST_FRAMES = 4096  # of all rows together; a larger batch takes as long in parts
_HOPS = 50  # of a stream, by which its hops have become as long as they may
_GOES_ON = 2**32  # frames after which a row ends that does not

_Path = tuple[str, ...]


@dataclass(frozen=True)
class ChunkFrames:
    """Numbers of mel frames that chunks usually have.

    Attributes:
        first: of first chunks.
        later: of those after; the last chunk of a stream is filled up to the next.
    """

    first: tuple[int, ...] = (16, 30)
    later: tuple[int, ...] = (10, 20, 50, 100, 200, 230)

    @classmethod
    def of(cls, flow: nn.Module, hift: nn.Module, hop_settings: HopSettings, pace: Pace) -> ChunkFrames:
        """Those of streams of a model; see session.py."""
        ratio, ahead = flow.token_mel_ratio, flow.pre_lookahead_len
        first = first_tokens(flow, hift, hop_settings, pace)
        later = set(islice(hops(first, tokens_held_back(flow, hift), pace, hop_settings), _HOPS))
        longest_last = ratio * (max(later) + ahead - 1) + hift.lookahead_frames
        return cls((ratio * first,), tuple(sorted({ratio * hop for hop in later} | {longest_last})))


@dataclass(frozen=True)
class _Form:
    """What every stream's state is like after its first chunk.

    Attributes:
        state: the state itself, its tensors without data.
        leaves: of each dtype, the paths and shapes (without rows) of its tensors.
        layers: paths of the layers that take an `end`.
        rates, shifts: int64 [layers]; a stream that ends after `n` frames of a chunk ends after `n * rate + shift` of
            a layer's inputs.
        held_back: samples still to come when all frames have been fed.
    """

    state: State
    leaves: dict[str, list[tuple[_Path, tuple[int, ...]]]]
    layers: list[_Path]
    rates: Tensor
    shifts: Tensor
    held_back: int

    @classmethod
    def of(cls, hift: nn.Module) -> _Form:
        """Found out by feeding a chunk and ending after 0 frames more, and after 1."""
        weight = next(hift.parameters())
        mel = weight.new_zeros(1, hift.conv_pre.in_channels, 2 * hift.lookahead_frames)
        state = hift.init_state(1, weight.device, weight.dtype)
        hift.forward_chunk(mel, state, finalize=False)
        of_none, rest = _inputs_until_end(hift, mel[..., :0], state)
        of_one, _ = _inputs_until_end(hift, mel[..., :1], state)

        del state["m_source"]["noise_position"]
        parts = dict(_parts(state))
        leaves: dict[str, list[tuple[_Path, tuple[int, ...]]]] = {}
        for path, leaf in parts.items():
            if isinstance(leaf, Tensor):
                leaves.setdefault(str(leaf.dtype), []).append((path, tuple(leaf.shape[1:])))
        paths = {".".join(path): path for path in parts}
        shifts, after_one = (torch.tensor(list(counts.values()), device=mel.device) for counts in (of_none, of_one))
        return cls(
            state=map_state(state, lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf),
            leaves=leaves,
            layers=[paths[name] for name in of_none],
            rates=after_one - shifts,
            shifts=shifts,
            held_back=rest.shape[1],
        )

    def fits(self, state: State) -> bool:
        """Whether a state is of this form."""
        return _shapes(state) == _shapes(self.state)

    def pack(self, state: State) -> State:
        """All tensors of a state, those of a dtype in one: [rows, size]."""
        return {
            dtype: torch.cat([_at(state, path).flatten(1) for path, _ in leaves], dim=1)
            for dtype, leaves in self.leaves.items()
        }

    def unpack(self, packed: State) -> State:
        """The state again; its tensors are views."""
        state = map_state(self.state, lambda leaf: leaf)
        for dtype, leaves in self.leaves.items():
            tensors = packed[dtype].split([prod(shape) for _, shape in leaves], dim=1)
            for (path, shape), tensor in zip(leaves, tensors, strict=True):
                _at(state, path[:-1])[path[-1]] = tensor.unflatten(1, shape)
        return state

    def put_ends(self, state: State, ends: Tensor) -> None:
        """Tell the layers after how many frames of the chunk each row ends, `ends` int64 [rows]."""
        for path, end in zip(self.layers, (ends[:, None] * self.rates + self.shifts).unbind(1), strict=True):
            _at(state, path)["end"] = end

    def room(self, rows: int, device: torch.device) -> State:
        """Zeros that packed states fit into."""
        sizes = {dtype: sum(prod(shape) for _, shape in leaves) for dtype, leaves in self.leaves.items()}
        types = {dtype: _at(self.state, leaves[0][0]).dtype for dtype, leaves in self.leaves.items()}
        return {dtype: torch.zeros(rows, sizes[dtype], dtype=types[dtype], device=device) for dtype in sizes}


@dataclass(frozen=True)
class _Inputs:
    """What a graph reads; all graphs share the memory.

    Attributes:
        mel: [rows, mel channels, frames].
        noise: [rows, samples, harmonics].
        ends: int64 [rows]; frames after which a row ends.
        packed: the state before the chunk, and once it has run the one after.
    """

    mel: Tensor
    noise: Tensor
    ends: Tensor
    packed: State

    def part(self, rows: int, frames: int, samples: int) -> _Inputs:
        """The start of the memory, in other shapes."""
        channels, harmonics = self.mel.shape[1], self.noise.shape[2]
        return _Inputs(
            self.mel.flatten()[: rows * channels * frames].view(rows, channels, frames),
            self.noise.flatten()[: rows * samples * harmonics].view(rows, samples, harmonics),
            self.ends[:rows],
            {dtype: tensor[:rows] for dtype, tensor in self.packed.items()},
        )


class StaticVocoder(nn.Module):
    """Takes the place of a vocoder for streams, whose states it keeps in a form of its own.

    Args:
        graphs: capture each usual shape as a CUDA graph at its first use.
        frames: of the usual shapes.
    """

    def __init__(self, hift: nn.Module, *, graphs: bool, frames: ChunkFrames | None = None) -> None:
        super().__init__()
        if graphs:
            _use_kernels(hift)
        self.hift = hift
        self.init_state = hift.init_state
        self.lookahead_frames = hift.lookahead_frames
        self._capture = partial(captured, pool=torch.cuda.graph_pool_handle()) if graphs else uncaptured
        self._usual = frames or ChunkFrames()
        self._steps: dict[tuple[int, int, bool], tuple[_Inputs, Callable[[], Tensor]]] = {}

    def warm_up(self, streams: int) -> None:
        """Capture all usual shapes, up to so many streams in a batch."""
        shapes = [
            (rows, frames, later)
            for later, usual in ((False, self._usual.first), (True, self._usual.later))
            for frames in usual
            if self._is_usual(frames, later)
            for rows in _ROWS[: 1 + _ROWS.index(_rows_of(streams))]
            if rows <= _most_rows(frames)
        ]
        for shape in sorted(shapes, key=lambda shape: -shape[0] * shape[1]):  # the others fit into the largest's memory
            self._step(*shape)

    def batch_key(self, mel: Tensor, state: State, *, finalize: bool) -> Hashable:
        """What chunks have in common that `forward_chunks` takes together."""
        frames = self._frames(mel, state, finalize)
        return form_of_chunk(mel, state, finalize=finalize) if frames is None else ("packed" in state, frames)

    def forward_chunks(
        self, mels: Sequence[Tensor], states: Sequence[State], finalize: Sequence[bool]
    ) -> Sequence[Tensor]:
        """The next mel frames [1, mel channels, n] of each of several streams, which have the same `batch_key`, to its
        next samples [1, any number]; see the vocoder's `forward_chunk`."""
        frames = self._frames(mels[0], states[0], finalize[0])
        if frames is None:
            return self._as_they_are(mels, states, finalize)
        most = _most_rows(frames)
        sounds: list[Tensor] = []
        for start in range(0, len(mels), most):
            part = slice(start, start + most)
            sounds += self._at_usual_shape(frames, mels[part], states[part], finalize[part])
        return sounds

    @cached_property
    def _form(self) -> _Form:
        return _Form.of(self.hift)

    @cached_property
    def _inputs(self) -> _Inputs:
        weight, hift = next(self.hift.parameters()), self.hift
        return _Inputs(
            mel=weight.new_zeros(1, hift.conv_pre.in_channels, _MOST_FRAMES),
            noise=weight.new_zeros(1, _MOST_FRAMES * hift.hop, hift.m_source.l_linear.in_features),
            ends=weight.new_zeros(_ROWS[-1], dtype=torch.int64),
            packed=self._form.room(_ROWS[-1], weight.device),
        )

    def _is_usual(self, frames: int, later: bool) -> bool:
        """Whether there is a graph for so many frames; after a shorter first chunk the state has another form."""
        if later:
            return frames in self._usual.later and frames <= _MOST_FRAMES
        return frames in self._usual.first and self.lookahead_frames <= frames <= _MOST_FRAMES

    def _frames(self, mel: Tensor, state: State, finalize: bool) -> int | None:
        """How many frames a chunk has in its graph; None: it runs as it is."""
        frames, later = mel.shape[2], "packed" in state
        if "conv_pre" in state or (finalize and not later):
            return None
        if finalize:
            enough = (size for size in self._usual.later if size >= frames + self.lookahead_frames)
            frames = next(enough, 0)
        return frames if self._is_usual(frames, later) else None

    def _at_usual_shape(
        self, frames: int, mels: Sequence[Tensor], states: Sequence[State], finalize: Sequence[bool]
    ) -> list[Tensor]:
        used, later = len(mels), "packed" in states[0]
        inputs, run = self._step(_rows_of(used), frames, later)
        samples = inputs.noise.shape[1]
        before = stack_states(states)
        positions = before["m_source"]["noise_position"]
        inputs.mel[:used] = torch.cat([_filled_up(mel, frames) for mel in mels])
        inputs.noise[:used] = self.hift.m_source.noise_from(positions, samples, inputs.noise.device)
        if later:
            ends = [mel.shape[2] if end else _GOES_ON for mel, end in zip(mels, finalize, strict=True)]
            inputs.ends[:used].copy_(torch.tensor(ends), non_blocking=True)
            for dtype, tensor in before["packed"].items():
                inputs.packed[dtype][:used] = tensor
        sounds = run()[:used].clone().split(1)
        packed = {dtype: tensor[:used].clone() for dtype, tensor in inputs.packed.items()}
        unstack_state({"m_source": {"noise_position": positions + samples}, "packed": packed}, states)
        return [
            self._ended(sound, mel, state) if end else sound
            for sound, mel, state, end in zip(sounds, mels, states, finalize, strict=True)
        ]

    def _ended(self, sound: Tensor, mel: Tensor, state: State) -> Tensor:
        state.clear()
        return sound[:, : mel.shape[2] * self.hift.hop + self._form.held_back]

    def _step(self, rows: int, frames: int, later: bool) -> tuple[_Inputs, Callable[[], Tensor]]:
        """Where a graph's inputs go, and what runs it and gives the sound [rows, samples]."""
        key = rows, frames, later
        if key in self._steps:
            return self._steps[key]
        hift, form = self.hift, self._form
        samples = frames * hift.hop if later else hift.m_source.ready(hift.f0_predictor.ready(frames))
        inputs = self._inputs.part(rows, frames, samples)

        def run() -> Tensor:
            state: State = {}
            if later:
                state = form.unpack(inputs.packed)
                form.put_ends(state, inputs.ends)
            sound = hift.forward_chunk(inputs.mel, state, finalize=False, noise=inputs.noise)
            for dtype, tensor in form.pack(state).items():
                inputs.packed[dtype].copy_(tensor)
            return sound

        self._steps[key] = inputs, self._capture(run, inputs.mel.device)
        return self._steps[key]

    def _as_they_are(
        self, mels: Sequence[Tensor], states: Sequence[State], finalize: Sequence[bool]
    ) -> Sequence[Tensor]:
        for state in states:
            if "packed" in state:
                unpacked = self._form.unpack(state.pop("packed"))
                state.update(unpacked | {"m_source": unpacked["m_source"] | state["m_source"]})
        sounds = vocode_alike(self.hift, mels, states, finalize)
        for state in [] if finalize[0] else states:
            position = {"noise_position": state["m_source"].pop("noise_position")}
            if self._form.fits(state):
                packed = self._form.pack(state)
                state.clear()
                state["packed"] = packed
            state.setdefault("m_source", {}).update(position)
        return sounds


def _use_kernels(hift: nn.Module) -> None:
    """Those that do several of PyTorch's at once, if they can be used on the vocoder's GPU and give the same."""
    weight = next(hift.parameters())
    try:
        from cosy_engine.token2wav import snake_kernel

        if snake_kernel.agrees(weight.device):
            snake_kernel.use_kernel(hift)
            return
        reason = "its values are not those of PyTorch's"
    except Exception as error:  # no Triton, or none for this GPU, or no compiler
        torch.cuda.synchronize(weight.device)  # fails too if the kernel broke the GPU's context
        reason = f"{type(error).__name__}: {error}"
    logger.warning("The vocoder's kernel is not used, its chunks take longer: %s", reason)


def _rows_of(streams: int) -> int:
    """The number of rows that a batch is filled up to."""
    return min(filled_up(streams, _ROWS), _ROWS[-1])


def _most_rows(frames: int) -> int:
    return max(rows for rows in _ROWS if rows * frames <= _MOST_FRAMES)


def _filled_up(mel: Tensor, frames: int) -> Tensor:
    return mel if mel.shape[2] == frames else F.pad(mel, (0, frames - mel.shape[2]))


def _inputs_until_end(hift: nn.Module, mel: Tensor, state: State) -> tuple[dict[str, int], Tensor]:
    """How many inputs each layer that takes an `end` has left when a stream ends with `mel`, and the sound."""
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.Module, inputs: tuple[Tensor | State, ...]) -> None:
        counts[name] = inputs[0].shape[-1]

    hooks = [
        layer.register_forward_pre_hook(partial(count, name))
        for name, layer in hift.named_modules()
        if isinstance(layer, StreamingConv1d | StreamingConvTranspose1d | STFT | InverseSTFT | SourceModule)
    ]
    try:
        return counts, hift.forward_chunk(mel, fork_state(state), finalize=True)
    finally:
        for hook in hooks:
            hook.remove()


def _parts(state: State, path: _Path = ()) -> Iterator[tuple[_Path, Leaf | State]]:
    """All that is in a state by its path, the states in it too."""
    for name, part in state.items():
        yield (*path, name), part
        if isinstance(part, dict):
            yield from _parts(part, (*path, name))


def _at(state: State, path: _Path) -> Leaf | State:
    return reduce(getitem, path, state)


def _shapes(state: State) -> dict[_Path, Hashable]:
    """The shapes without rows, and the numbers."""
    return {
        path: tuple(part.shape[1:]) if isinstance(part, Tensor) else part
        for path, part in _parts(state)
        if not isinstance(part, dict)
    }
