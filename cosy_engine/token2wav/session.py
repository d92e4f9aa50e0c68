"""One stream: speech tokens go in as they are made, chunks of sound come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cosy_engine.config import HopSettings
from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import State, init_state
from cosy_engine.token2wav.hops import chunk_ends
from cosy_engine.token2wav.speed import StreamingSpeed


def flow_prompt(flow: nn.Module, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """The prompt as the flow takes it: tokens `[1, p]`, mel `[1, f, 80]`, speaker `[1, 80]`, on the flow's device."""
    weight = flow.spk_embed_affine_layer.weight
    token = prompt.speech_token[None].to(weight.device)
    feat = prompt.speech_feat[None].to(weight)
    return token, feat, flow.project_speaker(prompt.embedding[None].to(weight))


class StreamSession:
    """State of one request between its tokens and its sound.

    A chunk feeds only its new tokens and frames to the flow and the vocoder: what came before lives in the session's
    state. The chunks are a function of the token count alone, so the sound does not depend on when tokens arrive.
    """

    def __init__(
        self, flow: nn.Module, hift: nn.Module, prompt: Prompt, hops: HopSettings, *, seed: int, speed: float = 1.0
    ) -> None:
        self._flow, self._hift = flow, hift
        token, self._prompt_feat, self._speaker = flow_prompt(flow, prompt)
        self._tokens: list[int] = token[0].tolist()
        self._prompt_tokens = len(self._tokens)
        device, dtype = self._prompt_feat.device, self._prompt_feat.dtype
        self._flow_state: State = init_state(flow, 1, device, dtype)
        self._vocoder_state: State = hift.init_state(1, device, torch.float32, seed=seed)
        self._speed = StreamingSpeed(speed)
        self._ends = chunk_ends(self._prompt_tokens, flow.chunk_size, hops)
        self._position = 0
        self._end = next(self._ends)
        self._finished = False

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
        return self._finished and (self._position == len(self._tokens) or len(self._tokens) == self._prompt_tokens)

    def step(self) -> Tensor:
        """The next chunk of sound, `[samples]` float32; it may be empty."""
        finalize = len(self._tokens) < self._end + self._flow.pre_lookahead_len
        end = len(self._tokens) if finalize else self._end
        fed = end if finalize else end + self._flow.pre_lookahead_len
        mel = self._speed.push(self._mel(fed, end, finalize), finalize=finalize)
        self._position = end
        self._end = next(self._ends)
        return self._hift.forward_chunk(mel.float(), self._vocoder_state, finalize=finalize)[0]

    def _mel(self, fed: int, end: int, finalize: bool) -> Tensor:
        """Mel `[1, 80, frames]` of the tokens from the last position to `end`, without the prompt's frames."""
        ratio = self._flow.token_mel_ratio
        first_frame, last_frame = self._position * ratio, end * ratio
        prompt_frames = self._prompt_feat.shape[1]
        cond = self._prompt_feat.new_zeros(1, self._prompt_feat.shape[2], last_frame - first_frame)
        given = self._prompt_feat[:, first_frame : min(last_frame, prompt_frames)]
        cond[:, :, : given.shape[1]] = given.transpose(1, 2)
        token = torch.tensor([self._tokens[self._position : fed]], dtype=torch.int32, device=cond.device)
        mel = self._flow.forward_chunk(token, cond, self._speaker, self._flow_state, finalize=finalize)
        return mel[:, :, max(0, prompt_frames - first_frame) :]
