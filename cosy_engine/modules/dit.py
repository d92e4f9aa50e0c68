"""CosyVoice3's velocity estimator: a diffusion transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.attention import (
    SelfAttention,
    attend,
    attention_masks,
    merge_heads,
    past_lengths,
    past_positions,
)
from cosy_engine.modules.causal_conv import CausalConv1d
from cosy_engine.modules.child_state import child_state
from cosy_engine.modules.streaming import State
from cosy_engine.modules.time_embedding import embed_time

_TIME_FREQUENCIES = 256


class TimestepEmbedding(nn.Module):
    """Time `[B]` -> `[B, dim]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(_TIME_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.time_mlp(embed_time(t, _TIME_FREQUENCIES).to(self.time_mlp[0].weight.dtype))


class CausalConvPositionEmbedding(nn.Module):
    """Two grouped causal convolutions, each followed by Mish, that tell a frame where it is among its neighbours."""

    def __init__(self, dim: int, kernel_size: int = 31, groups: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.ModuleList([CausalConv1d(dim, dim, kernel_size, groups)])
        self.conv2 = nn.ModuleList([CausalConv1d(dim, dim, kernel_size, groups)])

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """`[B, T, dim]` -> `[B, T, dim]`."""
        x = x.transpose(1, 2)
        x = F.mish(self.conv1[0](x, child_state(state, "conv1", "0")))
        x = F.mish(self.conv2[0](x, child_state(state, "conv2", "0")))
        return x.transpose(1, 2)


class InputEmbedding(nn.Module):
    """Joins the inputs of a frame and adds the position embedding."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.conv_pos_embed = CausalConvPositionEmbedding(dim)

    def forward(self, inputs: Tensor, state: State | None = None) -> Tensor:
        """`[B, T, in_dim]` -> `[B, T, dim]`."""
        x = self.proj(inputs)
        return x + self.conv_pos_embed(x, child_state(state, "conv_pos_embed"))


class RotaryEmbedding(nn.Module):
    """Cosine and sine of the rotation of each channel pair, base 10000 (RoFormer, arXiv 2104.09864)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, dim, 2).float() / dim))

    def _apply(self, fn, recurse: bool = True) -> RotaryEmbedding:
        """Moves with the model but keeps float32: in 16 bits, a position in the thousands turns by a wrong angle."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What a channel, and what the other one of its pair, is multiplied by: `[B, new, dim]` each.

        The positions are `[B, new]`.
        """
        angle = positions[:, :, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, cos], dim=3).flatten(2), torch.stack([-sin, sin], dim=3).flatten(2)


def rotate_first_heads(query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotates the channel pairs (0, 1), (2, 3), ... of head 0 of both `[B, heads, T, d]`; the other heads stay.

    The public models were trained so: their rotation comes before the split into heads.
    """
    own, other = (part[:, None].to(query.dtype) for part in rotation)
    first = torch.cat([query[:, :1], key[:, :1]], dim=1)
    swapped = torch.stack([first[..., 1::2], first[..., 0::2]], dim=4).flatten(3)
    rotated = torch.addcmul(first * own, swapped, other)
    if not torch.is_grad_enabled():  # the projections are nobody else's
        query[:, :1], key[:, :1] = rotated[:, :1], rotated[:, 1:]
        return query, key
    return torch.cat([rotated[:, :1], query[:, 1:]], dim=1), torch.cat([rotated[:, 1:], key[:, 1:]], dim=1)


class Attention(SelfAttention):
    """Multi-head self-attention. State: see `no_past`; the keys are kept rotated."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__(dim, heads, head_dim, dropout, bias=True)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], masks: Sequence[Tensor | None], state: State | None = None
    ) -> Tensor:
        query, key, value = self.project(x)
        query, key = rotate_first_heads(query, key, rotation)
        return self.to_out(merge_heads(attend(query, key, value, masks, state)))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear with `mult` times the width between."""

    def __init__(self, dim: int, mult: int, dropout: float) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class AdaptiveParameters(nn.Module):
    """Shifts, scales and gates `[B, count*dim]`, made from the time embedding `[B, dim]`."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(F.silu(t))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then the given shift and scale."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[2:], eps=1e-6), 1 + scale)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each modulated and gated by the time (arXiv 2212.09748, adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = AdaptiveParameters(dim, 6)
        self.attn = Attention(dim, heads, head_dim, dropout)
        self.ff = FeedForward(dim, ff_mult, dropout)

    def forward(
        self,
        x: Tensor,
        adaptive: Tensor,
        rotation: tuple[Tensor, Tensor],
        masks: Sequence[Tensor | None],
        state: State | None = None,
    ) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = adaptive[:, None].chunk(6, dim=2)
        attended = self.attn(_modulate(x, shift_attn, scale_attn), rotation, masks, child_state(state, "attn"))
        x = torch.addcmul(x, gate_attn, attended)
        return torch.addcmul(x, gate_ff, self.ff(_modulate(x, shift_ff, scale_ff)))


class DiT(nn.Module):
    """Velocity of the flow at one time.

    Args:
        dim: width; `depth` blocks, `heads` heads of `dim_head`, feed-forward `ff_mult` times as wide.
        mel_dim, mu_dim, spk_dim: channels of x and cond, of mu, of spks; `out_channels` is `mel_dim`.
        static_chunk_size: frames in a chunk of the streaming mask.
        num_decoding_left_chunks: unused; all earlier chunks are seen.
    """

    batches_streams = True

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.1,
        ff_mult: int = 4,
        mel_dim: int = 80,
        mu_dim: int = 80,
        spk_dim: int = 80,
        out_channels: int = 80,
        static_chunk_size: int = 50,
        num_decoding_left_chunks: int = -1,
    ) -> None:
        super().__init__()
        self.static_chunk_size = static_chunk_size
        self.time_embed = TimestepEmbedding(dim)
        self.input_embed = InputEmbedding(2 * mel_dim + mu_dim + spk_dim, dim)
        self.rotary_embed = RotaryEmbedding(dim_head)
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(dim, heads, dim_head, ff_mult, dropout) for _ in range(depth)]
        )
        self.norm_out = AdaptiveParameters(dim, 2)
        self.proj_out = nn.Linear(dim, out_channels)
        self._feature_sizes = [6 * dim] * depth + [2 * dim]

    def time_features(self, t: Tensor) -> Tensor:
        """All that depends on the time alone, `[B, (6*depth + 2)*dim]` for times `[B]`: of all `AdaptiveParameters`."""
        embedded = self.time_embed(t)
        adaptive = [block.attn_norm for block in self.transformer_blocks] + [self.norm_out]
        return torch.cat([parameters(embedded) for parameters in adaptive], dim=1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        state: State | None = None,
    ) -> Tensor:
        """Velocity `[B, out_channels, T]` of the frames fed now; where they are padding it means nothing.

        The arguments are those of `unet.CausalConditionalDecoder.forward`.
        """
        frames = x.shape[2]
        pasts = past_lengths(child_state(state, "transformer_blocks", "0", "attn"))
        masks = attention_masks(pasts, frames, self.static_chunk_size if streaming else 0, x.device, mask)
        *adaptive, last = (t if t.dim() == 2 else self.time_features(t)).split(self._feature_sizes, dim=1)
        inputs = torch.cat([x, cond, mu, spks[:, :, None].expand(-1, -1, frames)], dim=1)
        x = self.input_embed(inputs.transpose(1, 2), child_state(state, "input_embed"))
        rotation = self.rotary_embed(past_positions(pasts, frames, x.shape[0], x.device))
        rotation = rotation[0].to(x.dtype), rotation[1].to(x.dtype)
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, adaptive[index], rotation, masks, child_state(state, "transformer_blocks", str(index)))
        scale, shift = last[:, None].chunk(2, dim=2)
        return self.proj_out(_modulate(x, shift, scale)).transpose(1, 2)
