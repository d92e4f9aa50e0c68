"""One stream: speech tokens go in as they are made, chunks of sound come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import State, state_bytes
from cosy_engine.token2wav.hops import Pace, first_hop, hops
from cosy_engine.token2wav.memory import StreamMemory
from cosy_engine.token2wav.speed import StreamingSpeed
from cosy_engine.token2wav.voice_states import FlowPrompt, VoiceStates, has_room
from cosy_engine.token2wav.work import Encode, EulerSteps, Making, Room, Vocode


class StreamSession:
    """State of one request between its tokens and its sound.

    A chunk feeds only its new tokens and frames to the flow and the vocoder: what came before lives in the session's
    state. If the memory of all streams has no room for the flow's part of it, the next chunk feeds what came before
    again, as it was fed before. The chunks are a function of the token count alone, so the sound does not depend on
    when tokens arrive.
    """

    def __init__(
        self,
        flow: nn.Module,
        hift: nn.Module,
        voices: VoiceStates,
        memory: StreamMemory,
        prompt: Prompt,
        hop_settings: HopSettings,
        *,
        pace: Pace,
        seed: int,
        speed: float = 1.0,
    ) -> None:
        self._flow, self._hift, self._voices, self._memory, self._prompt = flow, hift, voices, memory, prompt
        self._given = FlowPrompt(flow, prompt)
        self._tokens: list[int] = prompt.speech_token.tolist()
        self._prompt_tokens = len(self._tokens)
        self._flow_state: State | None = None
        self._vocoder_state: State = hift.init_state(1, self._given.feat.device, torch.float32, seed=seed)
        self._speed = StreamingSpeed(speed)
        first, held_back = first_tokens(flow, hift, hop_settings, pace), tokens_held_back(flow, hift)
        self._fed = [voices.position(self._given)]  # where the flow's chunks ended
        self._end = self._prompt_tokens + first
        self._hops: Iterator[int] = hops(first, held_back, pace, hop_settings)
        self._finished = False
        self._making = False

    def push(self, tokens: Sequence[int]) -> None:
        """More speech tokens."""
        self._tokens.extend(tokens)

    def finish(self) -> None:
        """No more tokens will come; what is left becomes the last chunk."""
        self._finished = True

    @property
    def ready(self) -> bool:
        """Whether a `chunk` can be made now."""
        return self._finished and not self.done or len(self._tokens) >= self._end + self._flow.pre_lookahead_len

    @property
    def done(self) -> bool:
        """Whether every token has become sound."""
        return self._finished and len(self._tokens) in (self._fed[-1], self._prompt_tokens)

    def prepare(self) -> Making[None]:
        """Do what needs no token yet: the part of the flow that depends on the voice alone."""
        if self._flow_state is None:
            self._flow_state = yield from self._voices.after(self._prompt, self._given)
            self._memory.keep(self, 0)  # it is the voice's

    @property
    def in_pages(self) -> bool:
        """Whether the flow's state is in the pages of its estimator's pool."""
        return self._flow_state is not None and "stream" in self._flow_state["decoder"]

    def forget(self) -> bool:
        """Let go of the flow's state, which the next chunk makes again; False while it is used."""
        if self._making:
            return False
        self._flow_state = None
        return True

    def chunk(self) -> Making[Tensor]:
        """The next chunk of sound, `[samples]` float32; it may be empty."""
        finalize = len(self._tokens) < self._end + self._flow.pre_lookahead_len
        end = len(self._tokens) if finalize else self._end
        yield from self._remember(end)
        mel = yield from self._mel(self._fed[-1], end, finalize=finalize)
        self._making = False
        if not self._memory.keep(self, 0 if finalize else state_bytes(self._flow_state)):
            self._flow_state = None
        self._fed.append(end)
        self._end = end + next(self._hops)
        vocode = Vocode(
            self._hift, self._speed.push(mel.float(), finalize=finalize), self._vocoder_state, finalize=finalize
        )
        yield vocode
        return vocode.sound[0]

    def _remember(self, end: int) -> Making[None]:
        """Have the flow's state of what was fed before, with room for the tokens up to `end`."""
        room = Room(lambda: self._reserve(end - self._fed[-1]))
        if room.waits:
            yield room  # meanwhile others may need what this stream has
        if room.refused:
            self._flow_state = None
        self._making = True
        if self._flow_state is None:
            yield from self.prepare()
            if not (yield from has_room(self._flow_state, (end - self._fed[0]) * self._flow.token_mel_ratio)):
                self._flow_state = None  # which has the voice's pages
                self._flow_state = yield from self._voices.after_outside(self._given)
            for earlier in _together(self._fed, self._flow.chunk_size):
                yield from self._mel(*earlier, finalize=False)

    def _reserve(self, tokens: int) -> bool:
        if not self.in_pages:
            return True
        self._making = True  # or it might be the one to forget
        try:
            return self._flow_state["decoder"]["stream"].reserve(tokens * self._flow.token_mel_ratio)
        finally:
            self._making = False

    def _mel(self, start: int, end: int, *, finalize: bool) -> Making[Tensor]:
        """Mel `[1, 80, frames]` of the tokens from `start` to `end`, without the prompt's frames."""
        first_frame, last_frame = (position * self._flow.token_mel_ratio for position in (start, end))
        cond = self._given.condition(first_frame, last_frame)
        seen = end if finalize else end + self._flow.pre_lookahead_len
        token = torch.tensor([self._tokens[start:seen]], dtype=torch.int32).to(cond.device, non_blocking=True)
        encode = Encode(self._flow, token, self._flow_state, finalize=finalize)
        yield encode
        trajectory = self._flow.begin_chunk(
            token, cond, self._given.speaker, self._flow_state, finalize=finalize, mu=encode.mu
        )
        yield EulerSteps(self._flow.decoder, trajectory)
        return trajectory.x[:, :, max(0, len(self._given.feat) - first_frame) :]


def tokens_held_back(flow: nn.Module, hift: nn.Module) -> float:
    """How many of a stream's tokens are not heard yet though they are mel: those that the vocoder looks ahead to."""
    return hift.lookahead_frames / flow.token_mel_ratio


def first_tokens(flow: nn.Module, hift: nn.Module, settings: HopSettings, pace: Pace) -> int:
    """Tokens of a stream's first chunk, without those that the flow looks ahead to."""
    usual = flow.chunk_size - flow.pre_lookahead_len
    return settings.token_hop_len_first or first_hop(usual, tokens_held_back(flow, hift), pace)


def _together(ends: Sequence[int], chunk_size: int) -> Iterator[tuple[int, int]]:
    """The same chunks in as few feeds as have the same masks: those of whole mask chunks go with the ones after."""
    start = ends[0]
    for end in ends[1:]:
        if end == ends[-1] or (end - start) % chunk_size:
            yield start, end
            start = end
