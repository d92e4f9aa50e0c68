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
    """From mel `[1, 80, n]` to `sound [1, samples]`."""

    def __init__(self, hift: nn.Module, mel: Tensor, state: State, *, finalize: bool) -> None:
        self.hift, self.mel, self.state, self.finalize = hift, mel, state, finalize
        self.sound: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.sound is not None

    @property
    def key(self) -> Hashable:
        """Streams of as many frames whose states have the same form."""
        return "vocoder", self.finalize, self.mel.shape[2], form_of(self.state)

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
