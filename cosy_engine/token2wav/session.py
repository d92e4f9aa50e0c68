"""One stream: speech tokens go in as they are made, chunks of sound come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import State
from cosy_engine.token2wav.hops import chunk_ends
from cosy_engine.token2wav.speed import StreamingSpeed
from cosy_engine.token2wav.voice_states import FlowPrompt, VoiceStates


class StreamSession:
    """State of one request between its tokens and its sound.

    A chunk feeds only its new tokens and frames to the flow and the vocoder: what came before lives in the session's
    state. The chunks are a function of the token count alone, so the sound does not depend on when tokens arrive.
    """

    def __init__(
        self,
        flow: nn.Module,
        hift: nn.Module,
        voices: VoiceStates,
        prompt: Prompt,
        hops: HopSettings,
        *,
        seed: int,
        speed: float = 1.0,
    ) -> None:
        self._flow, self._hift, self._voices, self._prompt = flow, hift, voices, prompt
        self._given = FlowPrompt(flow, prompt)
        self._tokens: list[int] = prompt.speech_token.tolist()
        self._prompt_tokens = len(self._tokens)
        self._flow_state: State | None = None
        self._vocoder_state: State = hift.init_state(1, self._given.feat.device, torch.float32, seed=seed)
        self._speed = StreamingSpeed(speed)
        self._ends = chunk_ends(self._prompt_tokens, flow.chunk_size, hops)
        self._position = 0
        self._end = next(self._ends)
        self._finished = False

    def prepare(self) -> None:
        """Do what needs no token yet: the part of the flow that depends on the voice alone."""
        if self._flow_state is None:
            self._position, self._flow_state = self._voices.after(self._prompt, self._given)

    def push(self, tokens: Sequence[int]) -> None:
        """More speech tokens."""
        self._tokens.extend(tokens)

    def finish(self) -> None:
        """No more tokens will come; what is left becomes the last chunk."""
        self._finished = True

    @property
    def ready(self) -> bool:
        """Whether `step` can make a chunk now."""
        return self._finished and not self.done or len(self._tokens) >= self._end + self._flow.pre_lookahead_len

    @property
    def done(self) -> bool:
        """Whether every token has become sound."""
        return self._finished and len(self._tokens) in (self._position, self._prompt_tokens)

    def step(self) -> Tensor:
        """The next chunk of sound, `[samples]` float32; it may be empty."""
        self.prepare()
        finalize = len(self._tokens) < self._end + self._flow.pre_lookahead_len
        end = len(self._tokens) if finalize else self._end
        fed = end if finalize else end + self._flow.pre_lookahead_len
        mel = self._speed.push(self._mel(fed, end, finalize), finalize=finalize)
        self._position = end
        self._end = next(self._ends)
        return self._hift.forward_chunk(mel.float(), self._vocoder_state, finalize=finalize)[0]

    def _mel(self, fed: int, end: int, finalize: bool) -> Tensor:
        """Mel `[1, 80, frames]` of the tokens from the last position to `end`, without the prompt's frames."""
        first_frame, last_frame = (position * self._flow.token_mel_ratio for position in (self._position, end))
        cond = self._given.condition(first_frame, last_frame)
        token = torch.tensor([self._tokens[self._position : fed]], dtype=torch.int32, device=cond.device)
        mel = self._flow.forward_chunk(token, cond, self._given.speaker, self._flow_state, finalize=finalize)
        return mel[:, :, max(0, len(self._given.feat) - first_frame) :]
