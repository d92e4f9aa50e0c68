"""HiFT, the vocoder: mel at 50 Hz -> waveform at 24 kHz (HiFTNet, https://arxiv.org/abs/2309.09493).

An excitation signal made from the pitch is mixed, as a spectrum, into an upsampling network that ends in magnitudes and
phases for an inverse STFT. CosyVoice2's network looks both ways, CosyVoice3's is causal but for its first layers; apart
from the paddings they are the same, and so is the code.

Every layer keeps its own state (see streaming_layers), so a chunk costs its new frames only, and whatever has been
returned is what one call with the whole mel returns. No output needs to be cross-faded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import log, prod
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cosy_engine.modules.f0_predictor import ConvRNNF0Predictor
from cosy_engine.modules.source import SourceModule
from cosy_engine.modules.streaming import State
from cosy_engine.modules.streaming_layers import (
    STFT,
    InverseSTFT,
    ReflectStart,
    StreamingConv1d,
    StreamingConvTranspose1d,
    align,
    substate,
)


def _same_conv(
    in_channels: int, out_channels: int, kernel_size: int, causal: bool, dilation: int = 1
) -> StreamingConv1d:
    """As many frames out as in; looks to both sides, or back only."""
    context = (kernel_size - 1) * dilation
    right = 0 if causal else context // 2
    return weight_norm(
        StreamingConv1d(in_channels, out_channels, kernel_size, left=context - right, right=right, dilation=dilation)
    )


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, with one alpha a channel (https://arxiv.org/abs/2006.08195).

    Attributes:
        fused: computes the same of `(x, alpha)` at once, if there is such a function.
    """

    fused: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T] -> the same shape."""
        if self.fused is not None:
            return self.fused(x, self.alpha)
        alpha = self.alpha[:, None]
        return x + torch.sin(x * alpha).square() / (alpha + 1e-9)


class ResBlock(nn.Module):
    """Residual pairs of convolutions: a dilated one, a plain one."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int], causal: bool) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(channels, channels, kernel_size, causal, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same_conv(channels, channels, kernel_size, causal) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def ready(self, n: int) -> int:
        for conv in [*self.convs1, *self.convs2]:
            n = conv.ready(n)
        return n

    def forward(self, x: Tensor, state: State | None = None, *, finalize: bool = True) -> Tensor:
        """[B, channels, T] -> the same shape."""
        state = {} if state is None else state
        for i, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = conv1(self.activations1[i](x), substate(state, f"convs1.{i}"), finalize=finalize)
            y = conv2(self.activations2[i](y), substate(state, f"convs2.{i}"), finalize=finalize)
            x, y = align([x, y], substate(state, f"residual.{i}"))
            x = x + y
        return x


class HiFTGenerator(nn.Module):
    """CosyVoice2's vocoder. Looks `lookahead_frames` ahead; at the published sizes that is 20 (0.4 s).

    Runs in float32, its pitch predictor in float64. The constructor's arguments are those of the published
    configurations; `hop`, samples a mel frame, is the product of `upsample_rates` and the inverse STFT's hop.
    """

    causal = False

    def __init__(
        self,
        in_channels: int = 80,
        base_channels: int = 512,
        nb_harmonics: int = 8,
        sampling_rate: int = 24000,
        nsf_alpha: float = 0.1,
        nsf_sigma: float = 0.003,
        nsf_voiced_threshold: float = 10,
        upsample_rates: Sequence[int] = (8, 5, 3),
        upsample_kernel_sizes: Sequence[int] = (16, 11, 7),
        istft_params: Mapping[str, int] = MappingProxyType({"n_fft": 16, "hop_len": 4}),
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        source_resblock_kernel_sizes: Sequence[int] = (7, 7, 11),
        source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        lrelu_slope: float = 0.1,
        audio_limit: float = 0.99,
        *,
        f0_predictor: ConvRNNF0Predictor,
    ) -> None:
        super().__init__()
        causal = self.causal
        n_fft, istft_hop = istft_params["n_fft"], istft_params["hop_len"]
        self.hop = prod(upsample_rates) * istft_hop
        self.lrelu_slope = lrelu_slope
        self.audio_limit = audio_limit

        self.f0_predictor = f0_predictor
        self.m_source = SourceModule(
            sampling_rate, self.hop, nb_harmonics + 1, nsf_alpha, nsf_sigma, nsf_voiced_threshold, causal
        )
        self.stft = STFT(n_fft, istft_hop)
        self.conv_pre = _same_conv(in_channels, base_channels, 7, causal)

        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        channels = base_channels
        for i, (rate, kernel_size) in enumerate(zip(upsample_rates, upsample_kernel_sizes, strict=True)):
            if causal:
                up = StreamingConv1d(channels, channels // 2, kernel_size, left=kernel_size - 1, right=0, upsample=rate)
            else:
                up = StreamingConvTranspose1d(channels, channels // 2, kernel_size, rate)
            self.ups.append(weight_norm(up))
            channels //= 2

            down = prod(upsample_rates[i + 1 :])  # from the STFT's frame rate to this stage's
            size = 2 * down if down > 1 else 1
            left, right = (down - 1, 0) if causal else (down // 2, down // 2)
            self.source_downs.append(StreamingConv1d(n_fft + 2, channels, size, left=left, right=right, stride=down))
            self.source_resblocks.append(
                ResBlock(channels, source_resblock_kernel_sizes[i], source_resblock_dilation_sizes[i], causal)
            )
            self.resblocks.extend(
                ResBlock(channels, block_size, dilations, causal)
                for block_size, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True)
            )
        self.reflection_pad = ReflectStart(1)
        self.conv_post = _same_conv(channels, n_fft + 2, 7, causal)
        self.istft = InverseSTFT(n_fft, istft_hop)

    def _stage_blocks(self, stage: int) -> dict[int, ResBlock]:
        """The parallel residual blocks of a stage, by their number in `resblocks`."""
        n_blocks = len(self.resblocks) // len(self.ups)
        return {k: self.resblocks[k] for k in range(stage * n_blocks, (stage + 1) * n_blocks)}

    def samples_ready(self, frames: int) -> int:
        """How many samples `forward_chunk` has returned in all once `frames` frames were fed, before the end."""
        spectrum = self.stft.ready(self.m_source.ready(self.f0_predictor.ready(frames)))
        x = self.conv_pre.ready(frames)
        for i, up in enumerate(self.ups):
            x = up.ready(x)
            if i == len(self.ups) - 1:
                x = self.reflection_pad.ready(x)
            x = min(x, self.source_resblocks[i].ready(self.source_downs[i].ready(spectrum)))
            x = min(block.ready(x) for block in self._stage_blocks(i).values())
        return self.istft.ready(self.conv_post.ready(x))

    @property
    def lookahead_frames(self) -> int:
        """Frames held back: after n frames, at least the samples of the first n - lookahead_frames are out."""
        far = 1000
        return far - self.samples_ready(far) // self.hop

    def init_state(
        self, batch_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> State:
        """The state before the first frame. The seed chooses CosyVoice2's noise; CosyVoice3's is always the same."""
        return {"m_source": {"noise_position": self.m_source.noise_position(seed)}}

    def forward_chunk(self, mel: Tensor, state: State, *, finalize: bool, noise: Tensor | None = None) -> Tensor:
        """The next mel frames [B, in_channels, n] -> the next samples [B, any number].

        Chunks may have any length, 0 included. With `finalize` the rest is returned, `hop` samples a frame fed in
        all, and the state is spent. `noise` [B, enough, harmonics] replaces the source's own, whose position in the
        state then stays.
        """
        if mel.shape[-1] == 0 and "conv_pre" not in state:
            return mel.new_zeros(mel.shape[0], 0)
        f0 = self.f0_predictor(mel, substate(state, "f0_predictor"), finalize=finalize)
        s = self.m_source(f0, substate(state, "m_source"), finalize=finalize, noise=noise)
        return self._decode(mel, s, state, finalize)

    def forward(self, mel: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For training: mel [B, in_channels, T], noise [B, T * hop, harmonics] -> speech [B, T * hop], f0 [B, T]."""
        f0 = self.f0_predictor(mel)
        return self.decode(mel, self.m_source(f0, noise=noise)), f0

    def decode(self, mel: Tensor, s: Tensor) -> Tensor:
        """mel [B, in_channels, T] and excitation [B, 1, T * hop] -> speech [B, T * hop]."""
        return self._decode(mel, s, {}, finalize=True)

    def inference(
        self, speech_feat: Tensor, cache_source: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The public code's call for a whole mel.

        Args:
            speech_feat: mel [1, in_channels, T].
            cache_source: excitation [1, 1, m] that replaces the first m samples.
            noise: [1, T * hop, harmonics]; by default the fixed sequence from its start.

        Returns:
            speech [1, T * hop] and excitation [1, 1, T * hop].
        """
        s = self.m_source(self.f0_predictor(speech_feat), noise=noise)
        if cache_source is not None:
            s = torch.cat([cache_source, s[..., cache_source.shape[-1] :]], dim=-1)
        return self.decode(speech_feat, s), s

    def _decode(self, mel: Tensor, s: Tensor, state: State, finalize: bool) -> Tensor:
        spectrum = self.stft(s[:, 0], substate(state, "stft"), finalize=finalize)
        x = self.conv_pre(mel, substate(state, "conv_pre"), finalize=finalize)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.lrelu_slope), substate(state, f"ups.{i}"), finalize=finalize)
            if i == len(self.ups) - 1:
                x = self.reflection_pad(x, substate(state, "reflection_pad"))
            y = self.source_downs[i](spectrum, substate(state, f"source_downs.{i}"), finalize=finalize)
            y = self.source_resblocks[i](y, substate(state, f"source_resblocks.{i}"), finalize=finalize)
            x, y = align([x, y], substate(state, f"fusion.{i}"))
            x = x + y
            branches = [
                block(x, substate(state, f"resblocks.{k}"), finalize=finalize)
                for k, block in self._stage_blocks(i).items()
            ]
            x = reduce(torch.add, align(branches, substate(state, f"average.{i}"))) / len(branches)
        x = self.conv_post(F.leaky_relu(x), substate(state, "conv_post"), finalize=finalize)
        log_magnitude, phase = x.chunk(2, dim=1)
        magnitude = log_magnitude.clamp(max=log(100)).exp()
        speech = self.istft(magnitude, torch.sin(phase), substate(state, "istft"), finalize=finalize)
        return speech.clamp(-self.audio_limit, self.audio_limit)


class CausalHiFTGenerator(HiFTGenerator):
    """CosyVoice3's vocoder. Looks ahead only for the pitch and in `conv_pre`: 4 frames and 4 samples as published."""

    causal = True

    def __init__(self, *, conv_pre_look_right: int = 4, **generator: Any) -> None:
        """`generator`: HiFTGenerator's arguments."""
        super().__init__(**generator)
        self.conv_pre = weight_norm(
            StreamingConv1d(
                self.conv_pre.in_channels,
                self.conv_pre.out_channels,
                conv_pre_look_right + 1,
                left=0,
                right=conv_pre_look_right,
            )
        )

    def decode(self, x: Tensor, s: Tensor, finalize: bool = True) -> Tensor:
        """mel [B, in_channels, T] and excitation [B, 1, T * hop] -> speech [B, T * hop].

        With finalize=False, the last `conv_pre_look_right` + 1 frames are context only and give no samples.
        """
        speech = self._decode(x, s, {}, finalize)
        return speech if finalize else speech[:, : (x.shape[-1] - self.conv_pre.span) * self.hop]

    def inference(
        self, speech_feat: Tensor, finalize: bool = True, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The public code's call for all the mel there is.

        Args:
            speech_feat: mel [1, in_channels, T].
            finalize: False if more frames will follow; the pitch then needs the last 3 frames as context, and
                `decode` five of the rest.
            noise: [1, T * hop, harmonics]; by default the public fixed noise.

        Returns:
            speech [1, T * hop], or [1, (T - 8) * hop]; excitation [1, 1, T * hop], or [1, 1, (T - 3) * hop].
        """
        f0 = self.f0_predictor(speech_feat, finalize=finalize)
        s = self.m_source(f0, noise=noise)
        return self.decode(speech_feat[..., : f0.shape[-1]], s, finalize), s
