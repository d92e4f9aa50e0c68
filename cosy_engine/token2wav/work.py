"""What a chunk of sound waits for, as pieces that can be done for many streams at once.

A session makes a chunk in a generator: it yields the work to be done next and goes on when that is done. So whoever
drives the generators may interleave them, and do equal work of several in one batch.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from cosy_engine.modules.flow_matching import CausalConditionalCFM, Trajectory
from cosy_engine.modules.streaming import State, form_of, stack_states, unstack_state


class Work(Protocol):
    """Work with the same `key` can be done in one batch. `run` may have to be called again until it is `done`."""

    done: bool

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


class Encode:
    """From the next tokens of a stream, `[1, n]`, to `mu [1, 80, frames]`, which `flow.begin_chunk` takes."""

    def __init__(self, flow: nn.Module, token: Tensor, state: State, *, finalize: bool) -> None:
        self.flow, self.token, self.finalize = flow, token, finalize
        self._state = {name: part for name, part in state.items() if name != "decoder"}
        self.mu: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.mu is not None

    @property
    def key(self) -> Hashable:
        """Streams of as many tokens, whatever their pasts."""
        return "encoder", self.finalize, self.token.shape[1]

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        states = [work._state for work in batch]
        state = stack_states(states) if len(states) > 1 else states[0]
        token = torch.cat([work.token for work in batch])
        mu = batch[0].flow.encode_chunk(token, state, finalize=batch[0].finalize)
        if len(states) > 1:
            unstack_state(state, states)
        for work, own in zip(batch, mu.split(1), strict=True):
            work.mu = own


@dataclass
class EulerSteps:
    """From noise to mel, one Euler step at a time."""

    decoder: CausalConditionalCFM
    trajectory: Trajectory

    @property
    def done(self) -> bool:
        return self.trajectory.done

    @property
    def key(self) -> Hashable:
        """Streams of as many frames go together, whatever their pasts and steps; an estimator may fill up to a size."""
        if self.trajectory.states is None or not self.decoder.estimator.batches_streams:
            return "alone", id(self)
        frames, estimator = self.trajectory.x.shape[2], self.decoder.estimator
        return "flow", estimator.frames(frames) if hasattr(estimator, "frames") else frames

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        batch[0].decoder.advance([work.trajectory for work in batch])


class Vocode:
    """From mel `[1, 80, n]` to `sound [1, samples]`; streams of as many frames whose states have the same form."""

    def __init__(self, hift: nn.Module, mel: Tensor, state: State, *, finalize: bool) -> None:
        self.hift, self.mel, self.state, self.finalize = hift, mel, state, finalize
        self.sound: Tensor | None = None
        self.key: Hashable = ("vocoder", finalize, mel.shape[2], form_of(state))  # once: the scheduler asks often

    @property
    def done(self) -> bool:
        return self.sound is not None

    @classmethod
    def run(cls, batch: Sequence[Self]) -> None:
        if len(batch) == 1:
            (work,) = batch
            work.sound = work.hift.forward_chunk(work.mel, work.state, finalize=work.finalize)
            return
        state = stack_states([work.state for work in batch])
        sounds = batch[0].hift.forward_chunk(torch.cat([work.mel for work in batch]), state, finalize=batch[0].finalize)
        unstack_state(state, [work.state for work in batch])
        for work, sound in zip(batch, sounds.split(1), strict=True):
            work.sound = sound
