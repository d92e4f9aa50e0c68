"""CosyVoice2's token encoder at a few fixed shapes, so that a chunk of many streams is one replay of a CUDA graph.

Like the estimator it is many small kernels, which take longer to start than to run. Batches and chunks are filled up to
the next of a few sizes, and what each stream remembers is copied into a buffer, where all pasts end at the same place;
a mask hides the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.causal_conv import CausalFrameConv1d
from cosy_engine.modules.streaming import State
from cosy_engine.modules.upsample_encoder import AlignedPast, UpsampleConformerEncoder
from cosy_engine.token2wav.graphs import captured, filled_up, uncaptured

_TOKENS = (25, 50, 100, 200)  # of the hops, and of prompts
_STREAMS = (1, 2, 4, 8, 16, 32)
_WIDTHS = (256, 512, 1024, 2048)  # tokens, past and new ones; longer streams run without a graph
_MOST_SCORES = 2**25  # of a layer for all streams of a batch: enough to keep a GPU busy
_LEAST_ROOM = 64
_STRIDE = 2  # frames a token


class EncoderPast:
    """What the encoder remembers of one stream.

    Keys and values of all layers are one tensor `[units, length, 2*d]`, so that they are copied at once: for each head
    of a layer at the tokens' rate one unit of key and value side by side; of a layer at the frames' rate one of keys
    and one of values, with a token's two frames side by side. There is room for more in it, as in `KeyValues`, and a
    fork shares it in the same way: it has no room, so it moves out when it grows.

    Attributes:
        tails: `[tail_size]`, of the convolutions.
        length: tokens so far.
    """

    def __init__(self, keys_values: Tensor, tails: Tensor) -> None:
        self._keys_values, self.tails = keys_values, tails
        self.length = keys_values.shape[1]

    @property
    def keys_values(self) -> Tensor:
        return self._keys_values[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of it, room included."""
        return self._keys_values.nbytes + self.tails.nbytes

    def append(self, keys_values: Tensor, tails: Tensor) -> None:
        """More tokens, `[units, new, 2*d]`, which are copied, and the tails after them."""
        start, end = self.length, self.length + keys_values.shape[1]
        units, capacity, width = self._keys_values.shape
        if end > capacity:
            capacity = max(end, start + max(start // 2, _LEAST_ROOM)) if start else end
            grown = self._keys_values.new_empty(units, capacity, width)
            grown[:, :start] = self.keys_values
            self._keys_values = grown
        self._keys_values[:, start:end] = keys_values
        self.length, self.tails = end, tails

    def fork(self) -> EncoderPast:
        """A copy that can go on independently."""
        return EncoderPast(self.keys_values, self.tails)

    def to(self, device: torch.device) -> EncoderPast:
        """A copy on another device."""
        return EncoderPast(self.keys_values.to(device), self.tails.to(device))


@dataclass
class _Buffers:
    """Inputs of a batch at one shape.

    Attributes:
        xs: `[rows, tokens + lookahead, input_size]`.
        numbers: int64 `[3, rows]`: tokens in the past, tokens that are fed, and those with what is looked at.
        tails: `[rows, tail_size]`.
        keys_values: `[rows, units, width, 2*d]`.
        distances: of each layer, for an `AlignedPast`.
    """

    xs: Tensor
    numbers: Tensor
    tails: Tensor
    keys_values: Tensor
    distances: list[Tensor]


class StaticEncoder(nn.Module):
    """Takes the place of `encoder` in the flow: streams run at fixed shapes, whole utterances as they are.

    Args:
        positions: tokens of all streams of a batch together, past ones included, for which there is one buffer; a
            larger batch is run in parts.
        graphs: capture each shape as a CUDA graph at its first use.
    """

    def __init__(self, encoder: UpsampleConformerEncoder, *, positions: int, graphs: bool) -> None:
        super().__init__()
        self.encoder = encoder
        attention = encoder.encoders[0].self_attn
        self._heads, self._head_dim = attention.heads, attention.head_dim
        self._units = self._heads * (len(encoder.encoders) + _STRIDE * len(encoder.up_encoders))
        self._lookahead = encoder.pre_lookahead_layer.pre_lookahead_len
        self._convolutions: list[CausalFrameConv1d] = [encoder.pre_lookahead_layer.conv2, encoder.up_layer.conv]
        self._tail_sizes = [conv.in_channels * (conv.kernel_size[0] - 1) for conv in self._convolutions]
        self._positions = positions
        weight = encoder.embed.out[0].weight
        self._keys_values = weight.new_zeros(positions * self._units * 2 * self._head_dim)
        self._capture = partial(captured, pool=torch.cuda.graph_pool_handle()) if graphs else uncaptured
        self._steps: dict[tuple[int, int, int], tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]] = {}

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Of one stream."""
        keys_values = torch.zeros(self._units, 0, 2 * self._head_dim, device=device, dtype=dtype)
        return {"past": EncoderPast(keys_values, torch.zeros(sum(self._tail_sizes), device=device, dtype=dtype))}

    def forward(
        self,
        xs: Tensor,
        xs_lens: Tensor | None = None,
        context: Tensor | None = None,
        streaming: bool = False,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As the encoder's own; with a state, `[1, T, input_size]` of one stream."""
        if state is None:
            return self.encoder(xs, xs_lens, context, streaming)
        seen = xs if context is None else torch.cat([xs, context], dim=1)
        features = self.features(seen, [seen.shape[1]], [xs.shape[1]], [state])
        return features, torch.ones(1, 1, features.shape[1], dtype=torch.bool, device=xs.device)

    def tokens(self, count: int) -> int:
        """How many tokens a chunk of so many is filled up to."""
        return filled_up(count, _TOKENS)

    def warm_up(self, streams: int) -> None:
        """Capture what prompts and streams of usual lengths need, up to so many in a batch."""
        sizes = _STREAMS[: 1 + _STREAMS.index(filled_up(min(streams, _STREAMS[-1]), _STREAMS))]
        for size, tokens, width in (
            *product(sizes, _TOKENS[:3], _WIDTHS[:3]),
            *product(sizes[:3], _TOKENS[3:], _WIDTHS[:2]),
        ):
            if self._has_room(size, tokens, width):
                self._step(size, tokens, width)

    def features(self, xs: Tensor, seen: Sequence[int], counts: Sequence[int], states: Sequence[State]) -> Tensor:
        """Features `[B, 2*n, output_size]` of the next tokens of some streams; n is the largest of `counts`.

        Args:
            xs: `[B, T, input_size]`, embedded tokens, filled up with any.
            seen: of each stream, how many of its tokens are there; after them it ends.
            counts: how many of them are fed; those after them are only looked at. The features of others mean nothing.
            states: of `init_state`; what is fed is appended.
        """
        pasts = [state["past"] for state in states]
        longest, tokens = max(past.length for past in pasts), self.tokens(max(counts))
        rows = filled_up(len(states), _STREAMS)
        width = next((w for w in _WIDTHS if longest + tokens <= w and self._has_room(rows, tokens, w)), None)
        if len(states) > 1 and (width is None or len(states) > _STREAMS[-1]):
            half = len(states) // 2
            parts = [
                self.features(xs[part], seen[part], counts[part], states[part])
                for part in (slice(half), slice(half, None))
            ]
            frames = max(part.shape[1] for part in parts)
            return torch.cat([F.pad(part, (0, 0, 0, frames - part.shape[1])) for part in parts])
        buffers, step = self._step(rows, tokens, width or longest + tokens)
        self._fill(buffers, xs[:, : tokens + self._lookahead], seen, counts, pasts)
        features, tails = step()
        new = slice(buffers.keys_values.shape[2] - tokens, None)
        appended = zip(pasts, counts, tails[: len(states)].clone(), buffers.keys_values[:, :, new], strict=False)
        for past, count, own_tails, keys_values in appended:
            past.append(keys_values[:, :count], own_tails)
        return features[: len(states), : _STRIDE * max(counts)].clone()

    def _has_room(self, rows: int, tokens: int, width: int) -> bool:
        scores = rows * self._heads * _STRIDE * tokens * _STRIDE * width
        return rows * width <= self._positions and scores <= _MOST_SCORES

    def _step(self, rows: int, tokens: int, width: int) -> tuple[_Buffers, Callable[[], tuple[Tensor, Tensor]]]:
        """Buffers and what runs on them; captured, and kept, unless the shape is unusual."""
        key = rows, tokens, width
        if key in self._steps:
            return self._steps[key]
        usual = tokens in _TOKENS and width in _WIDTHS and self._has_room(*key)
        buffers = self._room_for(rows, tokens, width, shared=usual)

        def run() -> tuple[Tensor, Tensor]:
            return self._run(buffers, tokens)

        made = buffers, self._capture(run, buffers.xs.device) if usual else run
        if usual:
            self._steps[key] = made
        return made

    def _room_for(self, rows: int, tokens: int, width: int, *, shared: bool) -> _Buffers:
        size = rows * self._units * width * 2 * self._head_dim
        keys_values = self._keys_values[:size] if shared else self._keys_values.new_zeros(size)
        seen, device = tokens + self._lookahead, keys_values.device
        idle = torch.tensor([0, tokens, seen], device=device)  # attention to nothing is not a number, and would stay
        return _Buffers(
            xs=keys_values.new_zeros(rows, seen, self.encoder.embed.out[0].in_features),
            numbers=idle[:, None].repeat(1, rows),
            tails=keys_values.new_zeros(rows, sum(self._tail_sizes)),
            keys_values=keys_values.view(rows, self._units, width, 2 * self._head_dim),
            distances=[
                layer.self_attn.project_distances(times * width, times * tokens)
                for layers, times in ((self.encoder.encoders, 1), (self.encoder.up_encoders, _STRIDE))
                for layer in layers
            ],
        )

    def _fill(
        self,
        buffers: _Buffers,
        xs: Tensor,
        seen: Sequence[int],
        counts: Sequence[int],
        pasts: Sequence[EncoderPast],
    ) -> None:
        rows, longest, _ = buffers.xs.shape
        used, tokens = len(pasts), longest - self._lookahead
        idle = rows - used
        numbers = torch.tensor(
            [
                [past.length for past in pasts] + idle * [0],
                [*counts] + idle * [tokens],
                [*seen] + idle * [longest],
            ],
            pin_memory=buffers.numbers.is_cuda,
        )
        buffers.numbers.copy_(numbers, non_blocking=True)
        buffers.xs[:used, : xs.shape[1]] = xs
        buffers.tails[:used] = torch.stack([past.tails for past in pasts])
        capacity = buffers.keys_values.shape[2] - tokens
        for row, past in zip(buffers.keys_values[:, :, :capacity], pasts, strict=False):
            row[:, capacity - past.length :] = past.keys_values

    def _run(self, buffers: _Buffers, tokens: int) -> tuple[Tensor, Tensor]:
        """Features and the tails after them; the new keys and values are in the buffer, at its end."""
        encoder = self.encoder
        by_token, by_frame = buffers.numbers, _STRIDE * buffers.numbers
        seen = buffers.numbers[2]
        xs = encoder.embed(buffers.xs)
        after_end = torch.arange(xs.shape[1], device=xs.device) >= seen[:, None]
        xs = xs.masked_fill(after_end[:, :, None], 0)

        mixing, upsampling = (
            {"tail": tail.unflatten(1, (-1, conv.in_channels)), "next_tail": _next_tail(conv, counts)}
            for conv, (_, counts, _), tail in zip(
                self._convolutions, (by_token, by_frame), buffers.tails.split(self._tail_sizes, dim=1), strict=True
            )
        )
        pasts = self._pasts(buffers, by_token, by_frame)
        state = {
            "pre_lookahead_layer": {"conv2": mixing},
            "encoders": _states(pasts[: len(encoder.encoders)]),
            "up_layer": {"conv": upsampling},
            "up_encoders": _states(pasts[len(encoder.encoders) :]),
        }
        features, _ = encoder.forward_embedded(xs[:, :tokens], None, xs[:, tokens:], True, state)
        return features, torch.cat([conv["tail"].flatten(1) for conv in (mixing, upsampling)], dim=1)

    def _pasts(self, buffers: _Buffers, by_token: Tensor, by_frame: Tensor) -> list[AlignedPast]:
        """Of each layer, from the buffers' numbers in tokens and in frames."""
        layers = len(self.encoder.encoders)
        by_layer = [units.unflatten(3, (2, -1)) for units in buffers.keys_values.split(self._heads, dim=1)]
        keys_values = [units.unbind(3) for units in by_layer[:layers]]
        frames = [units.flatten(2, 3) for units in by_layer[layers:]]
        keys_values += zip(frames[::2], frames[1::2], strict=True)
        numbers = [by_token] * layers + [by_frame] * (len(keys_values) - layers)
        return [
            AlignedPast(keys, values, distances, lengths, counts)
            for (keys, values), distances, (lengths, counts, _) in zip(
                keys_values, buffers.distances, numbers, strict=True
            )
        ]


def use_static_encoder(flow: nn.Module, streams: int) -> None:
    """Put CosyVoice2's encoder on a GPU at static shapes, with one buffer for so many streams of 40 seconds, prompts
    included, or as much of that as a sixteenth of the GPU's memory holds. CosyVoice3's, one small layer, stays."""
    encoder = getattr(flow, "encoder", None)
    if not isinstance(encoder, UpsampleConformerEncoder) or encoder.upsample_stride != _STRIDE:
        return
    weight = encoder.embed.out[0].weight
    memory = torch.cuda.get_device_properties(weight.device).total_memory // 16
    size = 2 * weight.itemsize * encoder.output_size * (len(encoder.encoders) + _STRIDE * len(encoder.up_encoders))
    flow.encoder = StaticEncoder(encoder, positions=min(streams * _WIDTHS[2], memory // size), graphs=True)


def _states(pasts: Sequence[AlignedPast]) -> State:
    return {str(index): {"self_attn": {"past": past}} for index, past in enumerate(pasts)}


def _next_tail(conv: CausalFrameConv1d, counts: Tensor) -> Tensor:
    return counts[:, None] + torch.arange(conv.kernel_size[0] - 1, device=counts.device)
