"""The flow and the vocoder as one thing: tokens of a request to sound, whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.token2wav.hops import PACES
from cosy_engine.token2wav.memory import PooledMemory, StreamMemory, default_stream_memory, default_voice_cache
from cosy_engine.token2wav.session import StreamSession, first_tokens
from cosy_engine.token2wav.speed import change_speed
from cosy_engine.token2wav.upstream_exact import UpstreamSession
from cosy_engine.token2wav.voice_states import FlowPrompt, VoiceStates
from cosy_engine.token2wav.work import EulerSteps, Making, Vocode


class Session(Protocol):
    """What the engine needs of a stream. `prepare` may be driven at once, to do what needs no token; `chunk` gives
    `[samples]` float32."""

    @property
    def ready(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    def push(self, tokens: Sequence[int]) -> None: ...
    def finish(self) -> None: ...
    def prepare(self) -> Making[None]: ...
    def chunk(self) -> Making[Tensor]: ...


class WholeSession:
    """Everything at once, with full attention over the whole utterance: one chunk when the last token is there."""

    def __init__(self, flow: nn.Module, hift: nn.Module, prompt: Prompt, *, seed: int, speed: float) -> None:
        self._flow, self._hift, self._prompt = flow, hift, prompt
        self._seed, self._speed = seed, speed
        self._tokens: list[int] = []
        self._finished = False
        self.done = False

    def push(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)

    def finish(self) -> None:
        self._finished = True
        self.done = not self._tokens

    @property
    def ready(self) -> bool:
        return self._finished and not self.done

    def prepare(self) -> Making[None]:
        yield from ()

    def chunk(self) -> Making[Tensor]:
        self.done = True
        weight = self._flow.spk_embed_affine_layer.weight
        trajectory = self._flow.begin_inference(
            torch.tensor([self._tokens], dtype=torch.int32, device=weight.device),
            self._prompt.speech_token[None].to(weight.device),
            self._prompt.speech_feat[None].to(weight),
            self._prompt.embedding[None].to(weight),
            streaming=False,
            finalize=True,
        )
        yield EulerSteps(self._flow.decoder, trajectory)
        mel = change_speed(trajectory.x[:, :, len(self._prompt.speech_feat) :].float(), self._speed)
        state = self._hift.init_state(1, weight.device, torch.float32, seed=self._seed)
        vocode = Vocode(self._hift, mel, state, finalize=True)
        yield vocode
        return vocode.sound[0]


class Token2Wav:
    """Opens sessions.

    Args:
        voice_cache: bytes that the flow's states of prompts may take on the device, and again in host memory.
        stream_memory: bytes that the streams may keep between their chunks, where the flow's estimator has no pool of
            its own for them. For the defaults see memory.py.
    """

    def __init__(
        self,
        flow: nn.Module,
        hift: nn.Module,
        *,
        upstream_exact: bool = False,
        voice_cache: int | None = None,
        stream_memory: int | None = None,
    ) -> None:
        self.flow, self.hift = flow, hift
        device = flow.spk_embed_affine_layer.weight.device
        devices = [device] if device.type == "cpu" else [device, torch.device("cpu")]
        voice_cache = default_voice_cache(device) if voice_cache is None else voice_cache
        self._voices = VoiceStates(flow, [(where, voice_cache) for where in devices])
        pool = getattr(flow.decoder.estimator, "pool", None)
        if pool is None:
            self._memory = StreamMemory(default_stream_memory(device) if stream_memory is None else stream_memory)
        else:
            self._memory = PooledMemory(pool)
        self._pace = PACES[device.type]
        self._upstream_hop = {"token_hop_len": 25} if upstream_exact else None

    def remember(self, prompt: Prompt) -> Making[None]:
        """Compute what depends on the voice alone before it is first used."""
        if self._upstream_hop is None and prompt not in self._voices:
            yield from self._voices.after(prompt, FlowPrompt(self.flow, prompt))

    def first_tokens(self, hops: HopSettings) -> int:
        """Tokens that a stream's first chunk waits for."""
        return first_tokens(self.flow, self.hift, hops, self._pace) + self.flow.pre_lookahead_len

    def session(self, prompt: Prompt, hops: HopSettings, *, stream: bool, seed: int, speed: float = 1.0) -> Session:
        """A new stream in the voice of `prompt`; `seed` chooses the vocoder's noise."""
        if self._upstream_hop is not None:
            return UpstreamSession(self.flow, self.hift, prompt, self._upstream_hop, hops, stream, seed, speed)
        if not stream:
            return WholeSession(self.flow, self.hift, prompt, seed=seed, speed=speed)
        return StreamSession(
            self.flow, self.hift, self._voices, self._memory, prompt, hops, pace=self._pace, seed=seed, speed=speed
        )
