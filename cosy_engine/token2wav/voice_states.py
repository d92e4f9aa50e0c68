"""What the flow remembers of a prompt. It depends on the voice alone, so it is computed once for a voice."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict

import torch
from torch import Tensor, nn

from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import State, fork_state, init_state, state_bytes

logger = logging.getLogger(__name__)


class FlowPrompt:
    """A prompt as the flow takes it, on the flow's device.

    Attributes:
        token: int32 `[p]`.
        feat: mel `[frames, 80]`.
        speaker: projected speaker embedding `[1, 80]`.
    """

    def __init__(self, flow: nn.Module, prompt: Prompt) -> None:
        weight = flow.spk_embed_affine_layer.weight
        self.token = prompt.speech_token.to(weight.device)
        self.feat = prompt.speech_feat.to(weight)
        self.speaker = flow.project_speaker(prompt.embedding[None].to(weight))

    def condition(self, first_frame: int, last_frame: int) -> Tensor:
        """Mel `[1, 80, last - first]` that is given for these frames: the prompt's, then zeros."""
        cond = self.feat.new_zeros(1, self.feat.shape[1], last_frame - first_frame)
        given = self.feat[first_frame : min(last_frame, len(self.feat))]
        cond[0, :, : len(given)] = given.T
        return cond


class VoiceStates:
    """States of the flow after the whole mask chunks of prompts, least recently used ones dropped.

    Args:
        flow: the model they belong to.
        budget: bytes that may be held.

    Attributes:
        held: bytes that are.
    """

    def __init__(self, flow: nn.Module, budget: int) -> None:
        self._flow = flow
        self._budget = budget
        self.held = 0
        self._states: OrderedDict[bytes, tuple[int, State]] = OrderedDict()

    def __contains__(self, prompt: Prompt) -> bool:
        return _digest(prompt) in self._states

    @torch.inference_mode()
    def after(self, prompt: Prompt, given: FlowPrompt) -> tuple[int, State]:
        """How many of the prompt's tokens have been fed, and a state to go on from; the caller may change it."""
        key = _digest(prompt)
        if key not in self._states:
            self._states[key] = self._feed(given)
            self.held += state_bytes(self._states[key][1])
        self._states.move_to_end(key)
        position, state = self._states[key]
        while self.held > self._budget:
            _, (_, dropped) = self._states.popitem(last=False)
            self.held -= state_bytes(dropped)
        return position, fork_state(state)

    def _feed(self, given: FlowPrompt) -> tuple[int, State]:
        flow = self._flow
        state = init_state(flow, 1, given.feat.device, given.feat.dtype)
        position = max(0, len(given.token) - flow.pre_lookahead_len) // flow.chunk_size * flow.chunk_size
        if position:
            token = given.token[None, : position + flow.pre_lookahead_len]
            cond = given.condition(0, position * flow.token_mel_ratio)
            flow.forward_chunk(token, cond, given.speaker, state, finalize=False)
        return position, state


def _digest(prompt: Prompt) -> bytes:
    digest = hashlib.sha256()
    for tensor in (prompt.speech_token, prompt.speech_feat, prompt.embedding):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()
