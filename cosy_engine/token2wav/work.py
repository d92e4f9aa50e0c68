"""What a chunk of sound waits for, as pieces that can be done for many streams at once.

A session makes a chunk in a generator: it yields the work to be done next and goes on when that is done. So whoever
drives the generators may interleave them, and do equal work of several in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cosy_engine.modules.flow_matching import CausalConditionalCFM, Trajectory
from cosy_engine.modules.streaming import State, form_of, stack_states, unstack_state
from cosy_engine.token2wav.static_encoder import StaticEncoder


class Work(Protocol):
    """Work with the same `key` can be done in one batch. `run` may have to be called again until it is `done`; while it
    `waits`, only if there is nothing else to do."""

    done: bool
    waits: bool

    @property
    def key(self) -> Hashable: ...

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None: ...


_T = TypeVar("_T")
Making = Generator[Work, None, _T]


def complete(making: Making[_T]) -> _T:
    """Drive one generator to its end, on its own."""
    try:
        work = next(making)
        while True:
            while not work.done:
                work.run([work])
            work = next(making)
    except StopIteration as end:
        return end.value


class Room:
    """A stream's wait for memory that others have.

    Args:
        reserve: tries to get it, and says whether it did.

    Attributes:
        refused: it is not to be had, though nobody else is at work who could give some back.
    """

    def __init__(self, reserve: Callable[[], bool]) -> None:
        self._reserve = reserve
        self.done = self.refused = False

    @property
    def waits(self) -> bool:
        self.done = self.done or self._reserve()
        return not self.done

    @property
    def key(self) -> Hashable:
        return "room", id(self)

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        for work in batch:
            work.refused, work.done = not work.done, True


class Encode:
    """From the next tokens of a stream, `[1, n]`, to `mu [1, 80, frames]`, which `flow.begin_chunk` takes."""

    waits = False

    def __init__(self, flow: nn.Module, token: Tensor, state: State, *, finalize: bool) -> None:
        self.flow, self.token, self.finalize = flow, token, finalize
        self._state = {name: part for name, part in state.items() if name != "decoder"}
        self.mu: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.mu is not None

    @property
    def key(self) -> Hashable:
        """Streams of as many tokens, whatever their pasts; a static encoder fills them up to a size."""
        encoder = self._static_encoder
        if encoder is not None:
            return "encoder, filled up", encoder.tokens(self._fed)
        return "encoder", self.finalize, self.token.shape[1]

    @property
    def _static_encoder(self) -> StaticEncoder | None:
        encoder = getattr(self.flow, "encoder", None)
        return encoder if isinstance(encoder, StaticEncoder) else None

    @property
    def _fed(self) -> int:
        """How many tokens are fed; those after them are only looked at."""
        return self.token.shape[1] - (0 if self.finalize else self.flow.pre_lookahead_len)

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        if batch[0]._static_encoder is not None:
            cls._run_static(batch)
            return
        states = [work._state for work in batch]
        state = stack_states(states) if len(states) > 1 else states[0]
        token = torch.cat([work.token for work in batch])
        mu = batch[0].flow.encode_chunk(token, state, finalize=batch[0].finalize)
        if len(states) > 1:
            unstack_state(state, states)
        for work, own in zip(batch, mu.split(1), strict=True):
            work.mu = own

    @classmethod
    def _run_static(cls, batch: Sequence[Self]) -> None:
        flow, counts = batch[0].flow, [work._fed for work in batch]
        token = pad_sequence([work.token[0] for work in batch], batch_first=True)
        features = flow.encoder.features(
            flow.input_embedding(token.clamp(min=0)),
            [work.token.shape[1] for work in batch],
            counts,
            [work._state["encoder"] for work in batch],
        )
        mu = flow.encoder_proj(features).transpose(1, 2)
        for work, own, count in zip(batch, mu.split(1), counts, strict=True):
            work.mu = own[:, :, : flow.token_mel_ratio * count]


@dataclass
class EulerSteps:
    """From noise to mel, one Euler step at a time."""

    decoder: CausalConditionalCFM
    trajectory: Trajectory
    waits: ClassVar[bool] = False

    @property
    def done(self) -> bool:
        return self.trajectory.done

    @property
    def key(self) -> Hashable:
        """Streams of as many frames go together, whatever their pasts and steps; an estimator may fill up to a size."""
        states, frames, estimator = self.trajectory.states, self.trajectory.x.shape[2], self.decoder.estimator
        if states is None or not estimator.batches_streams:
            return "alone", id(self)
        if "stream" in states[0]:
            return "flow, filled up", estimator.frames(frames)
        return "flow", frames

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        batch[0].decoder.advance([work.trajectory for work in batch])


class Vocode:
    """From mel `[1, 80, n]` to `sound [1, samples]`.

    Streams of as many frames whose states have the same form go together, or those that the vocoder's own `batch_key`
    takes for alike.
    """

    waits = False

    def __init__(self, hift: nn.Module, mel: Tensor, state: State, *, finalize: bool) -> None:
        self.hift, self.mel, self.state, self.finalize = hift, mel, state, finalize
        self.sound: Tensor | None = None
        alike = getattr(hift, "batch_key", form_of_chunk)
        self.key: Hashable = ("vocoder", alike(mel, state, finalize=finalize))  # once: the scheduler asks often

    @property
    def done(self) -> bool:
        return self.sound is not None

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        vocode = getattr(batch[0].hift, "forward_chunks", partial(vocode_alike, batch[0].hift))
        mels, states, finalize = ([getattr(work, name) for work in batch] for name in ("mel", "state", "finalize"))
        for work, sound in zip(batch, vocode(mels, states, finalize), strict=True):
            work.sound = sound


def form_of_chunk(mel: Tensor, state: State, *, finalize: bool) -> Hashable:
    """What chunks have in common that `vocode_alike` takes together."""
    return finalize, mel.shape[2], form_of(state)


def vocode_alike(
    hift: nn.Module, mels: Sequence[Tensor], states: Sequence[State], finalize: Sequence[bool]
) -> Sequence[Tensor]:
    """The next chunk of each of several streams, which have the same `form_of_chunk`; see `hift.forward_chunk`."""
    if len(mels) == 1:
        return [hift.forward_chunk(mels[0], states[0], finalize=finalize[0])]
    state = stack_states(states)
    sounds = hift.forward_chunk(torch.cat(mels), state, finalize=finalize[0])
    for own in states:
        own.clear()  # it need not have all that it had
    unstack_state(state, states)
    return sounds.split(1)
