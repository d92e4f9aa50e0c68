"""What the flow remembers of a prompt. It depends on the voice alone, so it is computed once for a voice."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from cosy_engine.frontend import Prompt
from cosy_engine.modules.streaming import State, fork_state, init_state, move_state, state_bytes
from cosy_engine.token2wav.pages import StoredStream
from cosy_engine.token2wav.work import EulerSteps, Making, Room

logger = logging.getLogger(__name__)

_TOKENS_AT_A_TIME = 200  # whole mask chunks; others get a turn in between


class FlowPrompt:
    """A prompt as the flow takes it, on the flow's device.

    Attributes:
        token: int32 `[p]`.
        feat: mel `[frames, 80]`.
        speaker: projected speaker embedding `[1, 80]`.
    """

    def __init__(self, flow: nn.Module, prompt: Prompt) -> None:
        weight = flow.spk_embed_affine_layer.weight
        self.token = prompt.speech_token.to(weight.device, non_blocking=True)  # others' work is not waited for
        self.feat = prompt.speech_feat.to(weight, non_blocking=True)
        self.speaker = flow.project_speaker(prompt.embedding[None].to(weight, non_blocking=True))

    def condition(self, first_frame: int, last_frame: int) -> Tensor:
        """Mel `[1, 80, last - first]` that is given for these frames: the prompt's, then zeros."""
        cond = self.feat.new_zeros(1, self.feat.shape[1], last_frame - first_frame)
        given = self.feat[first_frame : min(last_frame, len(self.feat))]
        cond[0, :, : len(given)] = given.T
        return cond


class _Tier:
    """States that one memory holds, least recently used first."""

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget, self.held = device, budget, 0
        self.states: OrderedDict[bytes, State] = OrderedDict()

    def put(self, key: bytes, state: State) -> list[tuple[bytes, State]]:
        """Add a state as the latest; returns those that there is no room for."""
        self.take(key)
        self.states[key] = move_state(state, self.device)
        self.held += state_bytes(self.states[key])
        dropped = []
        while self.held > self.budget and self.states:
            oldest = next(iter(self.states))
            dropped.append((oldest, self.take(oldest)))
        return dropped

    def take(self, key: bytes) -> State | None:
        state = self.states.pop(key, None)
        self.held -= 0 if state is None else state_bytes(state)
        return state


class VoiceStates:
    """States of the flow after prompts: the latest ones on the first device, those before on the next, then dropped.

    Args:
        flow: the model they belong to.
        tiers: device and bytes that may be held there; the flow's device first.
    """

    def __init__(self, flow: nn.Module, tiers: Sequence[tuple[torch.device, int]]) -> None:
        self._flow = flow
        self._tiers = [_Tier(device, budget) for device, budget in tiers]
        self._pool = getattr(flow.decoder.estimator, "pool", None)
        if self._pool is not None:
            self._pool.reclaimers.append(WeakMethod(self._reclaim))

    @property
    def held(self) -> list[int]:
        """Bytes in each tier."""
        return [tier.held for tier in self._tiers]

    def __contains__(self, prompt: Prompt) -> bool:
        key = _digest(prompt)
        return any(key in tier.states for tier in self._tiers)

    def position(self, given: FlowPrompt) -> int:
        """How many of the prompt's tokens a state has been fed: all but those that the last of them look at."""
        return max(0, len(given.token) - self._flow.pre_lookahead_len)

    def after(self, prompt: Prompt, given: FlowPrompt) -> Making[State]:
        """A state that has been fed the prompt up to `position`; the caller may go on from it."""
        key, device = _digest(prompt), given.feat.device
        state = self._take(key, device)
        if state is None:
            made = yield from self._fed(given)
            state = self._take(key, device)  # somebody else may have been as quick
            if state is None:
                state = move_state(made, device)  # without room for more
                if "stream" in state["decoder"]:
                    state["decoder"]["stream"].separate_tails()
        going_on = fork_state(state)
        if self._pool is None or "stream" in state["decoder"]:
            self._put(0, key, state)
        return going_on

    def _take(self, key: bytes, device: torch.device) -> State | None:
        """The state of a voice; None: there is none, or no room for it where it is used."""
        state = next((found for tier in self._tiers if (found := tier.take(key)) is not None), None)
        state = None if state is None else move_state(state, device)
        return None if state is None or isinstance(state["decoder"].get("stream"), StoredStream) else state

    def _put(self, first: int, key: bytes, state: State) -> None:
        """Into a tier; what that has no room for goes to the next."""
        moving = [(key, state)]
        for tier in self._tiers[first:]:
            moving = [dropped for entry in moving for dropped in tier.put(*entry)]

    def _reclaim(self) -> bool:
        """Move the state that has not been used for longest, and is not in use, to the next tier."""
        tier = self._tiers[0]
        for key, state in tier.states.items():
            stream = state["decoder"].get("stream")
            if stream is not None and all(map(stream.pool.alone, stream.pages)):
                state = tier.take(key)
                try:
                    self._put(1, key, state)
                except RuntimeError as error:  # no memory there either
                    logger.warning("What the flow remembers of a voice is dropped: %s", error)
                return True
        return False

    def after_outside(self, given: FlowPrompt) -> Making[State]:
        """The same in memory of its own, for a stream that the estimator's pool has no room for; it is not kept."""
        state = init_state(self._flow, 1, given.feat.device, given.feat.dtype)
        state["decoder"] = {"offset": 0, "steps": {}}
        yield from self._feed(given, state)
        return state

    def _fed(self, given: FlowPrompt) -> Making[State]:
        state = init_state(self._flow, 1, given.feat.device, given.feat.dtype)
        if (yield from has_room(state, self.position(given) * self._flow.token_mel_ratio)):
            yield from self._feed(given, state)
            return state
        return (yield from self.after_outside(given))

    def _feed(self, given: FlowPrompt, state: State) -> Making[None]:
        flow, position = self._flow, self.position(given)
        for start in range(0, position, _TOKENS_AT_A_TIME):
            end = min(start + _TOKENS_AT_A_TIME, position)
            token = given.token[None, start : end + flow.pre_lookahead_len]
            cond = given.condition(start * flow.token_mel_ratio, end * flow.token_mel_ratio)
            yield EulerSteps(flow.decoder, flow.begin_chunk(token, cond, given.speaker, state, finalize=False))


def has_room(state: State, frames: int) -> Making[bool]:
    """Wait for pages for so many frames more; False: there are not as many. A state outside of a pool has room."""
    stream = state["decoder"].get("stream")
    if stream is None:
        return True
    room = Room(lambda: stream.reserve(frames))
    if room.waits:
        yield room
    return not room.refused


def _digest(prompt: Prompt) -> bytes:
    digest = hashlib.sha256()
    for tensor in (prompt.speech_token, prompt.speech_feat, prompt.embedding):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()
