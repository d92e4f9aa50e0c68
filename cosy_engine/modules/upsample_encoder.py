"""CosyVoice2's token encoder: a conformer without convolution modules that doubles the frame rate half-way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.attention import (
    attention_masks,
    merge_heads,
    no_past,
    past_of,
    rows_of,
    split_heads,
)
from cosy_engine.modules.causal_conv import CausalFrameConv1d, FrameConv1d
from cosy_engine.modules.child_state import child_state
from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.options import require
from cosy_engine.modules.streaming import State

_DISTANCE_BLOCK = 512
_ALIGNMENT = 8  # distances; a GPU multiplies matrices faster if their rows are aligned


class PreLookaheadLayer(nn.Module):
    """Mixes each token with the `pre_lookahead_len` tokens after it (and their mixture with the two before it)."""

    def __init__(self, in_channels: int, channels: int, pre_lookahead_len: int = 3) -> None:
        super().__init__()
        self.pre_lookahead_len = pre_lookahead_len
        self.conv1 = FrameConv1d(in_channels, channels, pre_lookahead_len + 1)
        self.conv2 = CausalFrameConv1d(channels, in_channels, 3)

    def forward(self, xs: Tensor, context: Tensor | None = None, state: State | None = None) -> Tensor:
        """`[B, T, in_channels]` -> the same shape.

        Args:
            context: `[B, up to pre_lookahead_len, in_channels]`, what follows `xs`; the rest is taken as zeros.
        """
        seen = xs if context is None else torch.cat([xs, context], dim=1)
        missing = xs.shape[1] + self.pre_lookahead_len - seen.shape[1]
        h = F.leaky_relu(self.conv1(F.pad(seen, (0, 0, 0, missing))))
        return xs + self.conv2(h, child_state(state, "conv2"))


class LinearNoSubsampling(nn.Module):
    """Linear, LayerNorm and the scale sqrt(out_dim) that goes with additive or relative positions."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float, positional_dropout: float) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(in_dim, out_dim), nn.LayerNorm(out_dim), nn.Dropout(dropout))
        self.scale = math.sqrt(out_dim)
        self.positional_dropout = nn.Dropout(positional_dropout)

    def forward(self, xs: Tensor) -> Tensor:
        """`[B, T, in_dim]` -> `[B, T, out_dim]`."""
        return self.positional_dropout(self.out(xs) * self.scale)


def embed_distances(first: int, last: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoidal embeddings of the distances first, first-1, ..., last: `[first-last+1, dim]` float32.

    A distance is query position minus key position. Channel 2i is the sine, 2i+1 the cosine of
    distance / 10000^(2i/dim) (Transformer-XL, arXiv 1901.02860).
    """
    distance = torch.arange(first, last - 1, -1, device=device, dtype=torch.float32)
    frequency = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    angle = distance[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def _distance_to_key(scores: Tensor, keys: int) -> Tensor:
    """Scores by distance to scores by key, without a copy.

    Column c of `scores [B, h, new, at least keys+new]` belongs to the distance keys-1-c. The result `[B, h, new, keys]`
    has in row i (query keys-new+i), column j the score of the distance keys-new+i-j, that is, of the column new-1-i+j.
    Read on at a row length shorter by one, each row begins one column before the last.
    """
    *_, new, distances = scores.shape
    read_on = scores.flatten(2)[:, :, new - 1 : new - 1 + new * (distances - 1)]
    return read_on.unflatten(2, (new, distances - 1))[..., :keys]


@dataclass
class AlignedPast:
    """Keys and values of all rows of a batch in one buffer, whatever their pasts: for shapes that never change.

    Every past ends where the new positions begin, so that distances are alike for all rows.

    Attributes:
        keys, values: `[B, heads, width, d]`: room, a row's past, room for the new positions.
        distances: of the layer's `project_distances`. A captured graph reads them, so they must not be others later.
        lengths: int64 `[B]`, the past positions of each row.
        counts: int64 `[B]`, how many of the new positions are no padding.
    """

    keys: Tensor
    values: Tensor
    distances: Tensor
    lengths: Tensor
    counts: Tensor

    def mask(self, new: int, chunk: int) -> Tensor:
        """Bool `[B, 1, new, width]`: which keys the new positions see; see `attention_masks`."""
        capacity, device = self.keys.shape[2] - new, self.lengths.device
        before = torch.arange(capacity, device=device) >= capacity - self.lengths[:, None]
        valid = torch.arange(new, device=device) < self.counts[:, None]
        (seen,) = attention_masks([0], new, chunk, device, valid[:, None])
        return torch.cat([part.expand(-1, -1, new, -1) for part in (before[:, None, None], seen)], dim=3)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with the new ones `[B, heads, new, d]` at the end."""
        self.keys[:, :, -key.shape[2] :] = key
        self.values[:, :, -key.shape[2] :] = value
        return self.keys, self.values


class RelPositionMultiHeadedAttention(nn.Module):
    """Self-attention with relative positions (Transformer-XL, arXiv 1901.02860).

    State: see `no_past`; its `past` may be an `AlignedPast` of all rows.

    The projected distances depend on the weights alone. Without gradients they are kept between calls, so that a chunk
    late in a stream does not project thousands of them again. They are projected in blocks of a fixed size: a value
    does not depend on which calls came before.
    """

    def __init__(self, heads: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, dim // heads, dropout
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, dim // heads)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, dim // heads)))
        self._distances: Tensor | None = None

    def init_own_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return no_past(batch_size, self.heads, self.head_dim, device, dtype)

    def _apply(self, fn, recurse: bool = True) -> RelPositionMultiHeadedAttention:
        self._distances = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._distances = None
        super()._load_from_state_dict(*args, **kwargs)

    def _project(self, first: int, last: int) -> Tensor:
        weight = self.linear_pos.weight
        return self.linear_pos(embed_distances(first, last, weight.shape[1], weight.device).to(weight.dtype))

    def _projected_distances(self, first: int, last: int) -> Tensor:
        """Projections `[first-last+1, dim]` of the distances first ... last (last <= 0 <= first)."""
        if torch.is_grad_enabled():
            self._distances = None  # the weights may be about to change
            return self._project(first, last)
        kept = self._distances  # of the distances reach-1 ... -reach
        reach = 0 if kept is None else kept.shape[0] // 2
        blocks = [] if kept is None else [kept]
        while reach < max(first + 1, -last):
            blocks.insert(0, self._project(reach + _DISTANCE_BLOCK - 1, reach))
            blocks.append(self._project(-reach - 1, -reach - _DISTANCE_BLOCK))
            reach += _DISTANCE_BLOCK
        if len(blocks) > 1:
            kept = self._distances = torch.cat(blocks)
        return kept[reach - 1 - first : reach - last]

    def project_distances(self, keys: int, new: int) -> Tensor:
        """Projections `[heads, d, at least keys+new]` of the distances keys-1, keys-2, ... of new positions to keys."""
        columns = -(-(keys + new) // _ALIGNMENT) * _ALIGNMENT
        return self._projected_distances(keys - 1, keys - columns).unflatten(1, (self.heads, -1)).permute(1, 2, 0)

    def forward(self, x: Tensor, masks: Sequence[Tensor | None], state: State | None = None) -> Tensor:
        """`[B, new, dim]` -> the same shape.

        Args:
            masks: 0 where a key is seen, -inf where not, `[B or 1, 1, new or 1, past+new]`; None: all are seen. One for
                each stream of the batch.
        """
        query, key, value = (
            split_heads(layer(x), self.heads) for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        pasts = past_of(state) or [None]
        rows = zip(*(rows_of(part, len(pasts)) for part in (query, key, value)), masks, pasts, strict=True)
        attended = [self._attend(*own) for own in rows]
        return self.linear_out(merge_heads(attended[0] if len(attended) == 1 else torch.cat(attended)))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, past: KeyValues | AlignedPast | None
    ) -> Tensor:
        """Attention `[B, heads, new, d]` of new positions to themselves and to the past, which they are appended to."""
        if past is not None:
            key, value = past.extend(key, value)
        batch, _, new, _ = query.shape
        distances = past.distances if isinstance(past, AlignedPast) else self.project_distances(key.shape[2], new)
        scaled_query = (query + self.pos_bias_v[:, None]) * self.head_dim**-0.5
        scores = scaled_query.transpose(0, 1).flatten(1, 2) @ distances  # of a head for all rows: one product each
        bias = _distance_to_key(scores.unflatten(1, (batch, new)).transpose(0, 1), key.shape[2])
        if mask is not None:
            bias = bias + mask
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query + self.pos_bias_u[:, None], key, value, bias, dropout)


class PositionwiseFeedForward(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.w_2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(F.silu(self.w_1(x))))


class ConformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward, each after its LayerNorm and with a residual."""

    def __init__(self, dim: int, heads: int, linear_units: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm_mha = nn.LayerNorm(dim, eps=1e-12)
        self.self_attn = RelPositionMultiHeadedAttention(heads, dim, attention_dropout)
        self.norm_ff = nn.LayerNorm(dim, eps=1e-12)
        self.feed_forward = PositionwiseFeedForward(dim, linear_units, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, masks: Sequence[Tensor | None], state: State | None = None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.norm_mha(x), masks, child_state(state, "self_attn")))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class Upsample1D(nn.Module):
    """Repeats each frame `stride` times, then a causal convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalFrameConv1d(channels, channels, 2 * stride + 1)

    def forward(self, xs: Tensor, state: State | None = None) -> Tensor:
        """`[B, T, channels]` -> `[B, stride*T, channels]`."""
        return self.conv(xs.repeat_interleave(self.stride, dim=1), child_state(state, "conv"))


class UpsampleConformerEncoder(nn.Module):
    """Embedded tokens at 25 Hz to features at 50 Hz.

    Args:
        input_size, output_size: channels of a token's embedding and of a feature.
        num_blocks, num_up_blocks: layers before and after the upsampling by `upsample_stride`.
        static_chunk_size: tokens in a chunk of the streaming mask.

    Raises:
        ModelDirectoryError: a variant of the encoder that neither public model uses.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str = "linear",
        pos_enc_layer_type: str = "rel_pos_espnet",
        selfattention_layer_type: str = "rel_selfattn",
        normalize_before: bool = True,
        use_cnn_module: bool = False,
        macaron_style: bool = False,
        static_chunk_size: int = 25,
        num_up_blocks: int = 4,
        upsample_stride: int = 2,
        pre_lookahead_len: int = 3,
    ) -> None:
        super().__init__()
        require(
            input_layer=(input_layer, "linear"),
            pos_enc_layer_type=(pos_enc_layer_type, "rel_pos_espnet"),
            selfattention_layer_type=(selfattention_layer_type, "rel_selfattn"),
            normalize_before=(normalize_before, True),
            use_cnn_module=(use_cnn_module, False),
            macaron_style=(macaron_style, False),
        )
        self.output_size = output_size
        self.static_chunk_size = static_chunk_size
        self.upsample_stride = upsample_stride

        def layers(count: int) -> nn.ModuleList:
            sizes = (output_size, attention_heads, linear_units, dropout_rate, attention_dropout_rate)
            return nn.ModuleList([ConformerEncoderLayer(*sizes) for _ in range(count)])

        self.embed = LinearNoSubsampling(input_size, output_size, dropout_rate, positional_dropout_rate)
        self.pre_lookahead_layer = PreLookaheadLayer(output_size, output_size, pre_lookahead_len)
        self.encoders = layers(num_blocks)
        self.up_layer = Upsample1D(output_size, upsample_stride)
        self.up_embed = LinearNoSubsampling(output_size, output_size, dropout_rate, positional_dropout_rate)
        self.up_encoders = layers(num_up_blocks)
        self.after_norm = nn.LayerNorm(output_size)

    def forward(
        self,
        xs: Tensor,
        xs_lens: Tensor | None = None,
        context: Tensor | None = None,
        streaming: bool = False,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features `[B, stride*T, output_size]` of the tokens fed now, and which of them are not padding.

        Args:
            xs: `[B, T, input_size]`, embedded tokens.
            xs_lens: `[B]`, how many of them are not padding; None: all. Padding is hidden as attention key only, so the
                features of padding mean nothing.
            context: `[B, up to 3, input_size]`, the embedded tokens that follow, if they are known.
            streaming: use the chunk mask.
            state: of the tokens fed before; None: there are none, and none will follow.

        Returns:
            features, and bool `[B, 1, stride*T]`.
        """
        context = None if context is None or context.numel() == 0 else self.embed(context)
        return self.forward_embedded(self.embed(xs), xs_lens, context, streaming, state)

    def forward_embedded(
        self, xs: Tensor, xs_lens: Tensor | None, context: Tensor | None, streaming: bool, state: State | None
    ) -> tuple[Tensor, Tensor]:
        """The same after `embed`: `xs` and `context` are `[B, T, output_size]`."""
        chunk = self.static_chunk_size if streaming else 0
        stride = self.upsample_stride
        xs = self.pre_lookahead_layer(xs, context, child_state(state, "pre_lookahead_layer"))
        valid = _valid(xs, xs_lens)
        xs = _run(self.encoders, xs, valid, chunk, child_state(state, "encoders"))
        xs = self.up_embed(self.up_layer(xs, child_state(state, "up_layer")))
        valid = _valid(xs, None if xs_lens is None else xs_lens * stride)
        xs = _run(self.up_encoders, xs, valid, chunk * stride, child_state(state, "up_encoders"))
        if valid is None:
            valid = torch.ones(xs.shape[0], 1, xs.shape[1], dtype=torch.bool, device=xs.device)
        return self.after_norm(xs), valid


def _valid(xs: Tensor, lens: Tensor | None) -> Tensor | None:
    """Bool `[B, 1, T]`: which rows of `xs [B, T, D]` are not padding; None: all."""
    return None if lens is None else torch.arange(xs.shape[1], device=xs.device) < lens[:, None, None]


def _run(layers: nn.ModuleList, xs: Tensor, valid: Tensor | None, chunk: int, state: State | None) -> Tensor:
    pasts, new = past_of(child_state(state, "0", "self_attn")), xs.shape[1]
    if pasts and isinstance(pasts[0], AlignedPast):
        masks = [pasts[0].mask(new, chunk)]
    else:
        masks = attention_masks([past.length for past in pasts] or [0], new, chunk, xs.device, valid)
    masks = [
        None if mask is None else torch.zeros_like(mask, dtype=xs.dtype).masked_fill_(~mask, -torch.inf)
        for mask in masks
    ]
    for index, layer in enumerate(layers):
        xs = layer(xs, masks, child_state(state, str(index)))
    return xs
