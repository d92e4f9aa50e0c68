"""CosyVoice2's velocity estimator: a one-level U-Net of causal convolutions and transformer blocks.

Within it all is `[B, T, C]`, so that a convolution, too, is one product of matrices and nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.attention import SelfAttention, attend, attention_masks, merge_heads, past_lengths
from cosy_engine.modules.causal_conv import CausalFrameConv1d, FrameConv1d
from cosy_engine.modules.child_state import child_state
from cosy_engine.modules.options import require
from cosy_engine.modules.streaming import State
from cosy_engine.modules.time_embedding import embed_time


class CausalBlock1D(nn.Module):
    """Causal convolution over 3 frames, LayerNorm over the channels, Mish."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"0": CausalFrameConv1d(in_channels, out_channels, 3), "2": nn.LayerNorm(out_channels)}
        )

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return F.mish(self.block["2"](self.block["0"](x, child_state(state, "block", "0"))))


class CausalResnetBlock1D(nn.Module):
    """Two causal blocks with a shift, made from the time, between them, and a 1x1 convolution around them."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_dim, out_channels))
        self.block1 = CausalBlock1D(in_channels, out_channels)
        self.block2 = CausalBlock1D(out_channels, out_channels)
        self.res_conv = FrameConv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, shift: Tensor, state: State | None = None) -> Tensor:
        h = self.block1(x, child_state(state, "block1")) + shift[:, None]
        return self.block2(h, child_state(state, "block2")) + self.res_conv(x)


class Attention(SelfAttention):
    """Multi-head self-attention without positions. State: see `no_past`."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__(dim, heads, head_dim, dropout, bias=False)

    def forward(self, x: Tensor, masks: Sequence[Tensor | None], state: State | None = None) -> Tensor:
        query, key, value = self.project(x)
        return self.to_out(merge_heads(attend(query, key, value, masks, state)))


class _LinearGELU(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, Linear with four times the width between."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(_LinearGELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention and feed-forward, each after its LayerNorm and with a residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    def forward(self, x: Tensor, masks: Sequence[Tensor | None], state: State | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), masks, child_state(state, "attn1"))
        return x + self.ff(self.norm3(x))


class Stage(nn.ModuleList):
    """Child 0: a residual block; child 1: transformer blocks; child 2, which the caller applies: a convolution."""

    def forward(self, x: Tensor, shift: Tensor, masks: Sequence[Tensor | None], state: State | None = None) -> Tensor:
        """x: `[B, T, C]`; shift: `[B, C]`, of the residual block; masks: of `attention_masks`."""
        x = self[0](x, shift, child_state(state, "0"))
        for index, block in enumerate(self[1]):
            x = block(x, masks, child_state(state, "1", str(index)))
        return x


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedded)))


class CausalConditionalDecoder(nn.Module):
    """Velocity of the flow at one time.

    Early model directories name it `ConditionalDecoder` with `causal: True` and give no `static_chunk_size`.

    Args:
        in_channels: channels of x, mu, spks and cond together.
        channels: width of the one level.
        static_chunk_size: frames in a chunk of the streaming mask.
        num_decoding_left_chunks: unused; all earlier chunks are seen.

    Raises:
        ModelDirectoryError: several levels, another activation, or not causal.
    """

    batches_streams = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (256,),
        dropout: float = 0.05,
        attention_head_dim: int = 64,
        n_blocks: int = 1,
        num_mid_blocks: int = 2,
        num_heads: int = 4,
        act_fn: str = "gelu",
        static_chunk_size: int = 50,
        num_decoding_left_chunks: int = -1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        require(levels_in_channels=(len(channels), 1), act_fn=(act_fn, "gelu"), causal=(causal, True))
        width = channels[0]
        time_dim = 4 * width
        self.in_channels = in_channels
        self.static_chunk_size = static_chunk_size
        self.time_mlp = TimestepEmbedding(in_channels, time_dim)

        def stage(stage_channels: int, *last: nn.Module) -> Stage:
            blocks = [BasicTransformerBlock(width, num_heads, attention_head_dim, dropout) for _ in range(n_blocks)]
            return Stage([CausalResnetBlock1D(stage_channels, width, time_dim), nn.ModuleList(blocks), *last])

        self.down_blocks = nn.ModuleList([stage(in_channels, CausalFrameConv1d(width, width, 3))])
        self.mid_blocks = nn.ModuleList([stage(width) for _ in range(num_mid_blocks)])
        self.up_blocks = nn.ModuleList([stage(2 * width, CausalFrameConv1d(width, width, 3))])
        self.final_block = CausalBlock1D(width, width)
        self.final_proj = FrameConv1d(width, out_channels, 1)

    def time_features(self, t: Tensor) -> Tensor:
        """All that depends on the time alone, `[B, stages*C]` for times `[B]`: the shift of each stage."""
        embedded = self.time_mlp(embed_time(t, self.in_channels).to(self.time_mlp.linear_1.weight.dtype))
        stages = (self.down_blocks[0], *self.mid_blocks, self.up_blocks[0])
        return torch.cat([stage[0].mlp(embedded) for stage in stages], dim=1)

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
        """Velocity `[B, out_channels, T]` of the frames fed now, 0 where they are padding.

        Args:
            x: `[B, 80, T]`, where the flow is at time `t`.
            t: `[B]`, or what `time_features` makes of it.
            mask: `[B, 1, T]`, nonzero where a frame is not padding (padding comes after all others); None: no padding.
            mu: `[B, 80, T]`, what the tokens say.
            spks: `[B, 80]`, the projected speaker embedding.
            cond: `[B, 80, T]`, the prompt's mel, 0 after it.
            streaming: use the chunk mask.
            state: of the frames fed before, of several streams if it is of `stack_states`; None: there are none, and
                none will follow.
        """
        frames = x.shape[2]
        pasts = past_lengths(child_state(state, "down_blocks", "0", "1", "0", "attn1"))
        masks = attention_masks(pasts, frames, self.static_chunk_size if streaming else 0, x.device, mask)
        shifts = iter((t if t.dim() == 2 else self.time_features(t)).chunk(len(self.mid_blocks) + 2, dim=1))
        x = torch.cat([x, mu, spks[:, :, None].expand(-1, -1, frames), cond], dim=1).transpose(1, 2)

        skip = self.down_blocks[0](x, next(shifts), masks, child_state(state, "down_blocks", "0"))
        x = self.down_blocks[0][2](skip, child_state(state, "down_blocks", "0", "2"))
        for index, mid_block in enumerate(self.mid_blocks):
            x = mid_block(x, next(shifts), masks, child_state(state, "mid_blocks", str(index)))
        x = self.up_blocks[0](torch.cat([x, skip], dim=2), next(shifts), masks, child_state(state, "up_blocks", "0"))
        x = self.up_blocks[0][2](x, child_state(state, "up_blocks", "0", "2"))
        velocity = self.final_proj(self.final_block(x, child_state(state, "final_block"))).transpose(1, 2)
        return velocity if mask is None else velocity * mask
