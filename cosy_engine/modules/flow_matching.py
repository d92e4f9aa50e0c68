"""Conditional flow matching (arXiv 2210.02747): from noise to mel along the velocity that the estimator gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.errors import BackendFailedError, InvalidRequestError, ModelDirectoryError
from cosy_engine.modules.options import require
from cosy_engine.modules.streaming import State, init_state, stack_states, unstack_state

_MOST_STEPS = 100
MAX_FRAMES = 50 * 300  # five minutes, the length of the one noise that every request starts from


@cache
def euler_steps(count: int) -> tuple[tuple[float, float], ...]:
    """Time and length of each Euler step from 0 to 1, short at first: times 1 - cos(pi/2 * k/count) in float32.

    The time is summed up and a step ends where the grid says, so that rounding does not add up; the public code's way.
    """
    grid = 1 - torch.cos(torch.linspace(0, 1, count + 1) * 0.5 * torch.pi)
    t, steps = grid[0], []
    for end in grid[1:]:
        dt = end - t
        steps.append((t.item(), dt.item()))
        t = t + dt
    return tuple(steps)


@dataclass
class EstimatorInputs:
    """One stream's arguments of an estimator; see `unet.CausalConditionalDecoder.forward`."""

    x: Tensor
    mask: Tensor | None
    mu: Tensor
    t: Tensor
    spks: Tensor
    cond: Tensor
    state: State | None


@dataclass
class Trajectory:
    """Frames on their way from noise to mel.

    Attributes:
        x: `[B, 80, T]` float32 (float64 if mu is), where they are; mel at the end.
        mu, cond: `[2B, 80, T]`, what is given, and as much without it; `spks [2B, 80]` likewise.
        mask: `[2B, 1, T]`, nonzero where a frame is not padding; None: no padding.
        lengths: of the Euler steps that are left.
        times: what the estimator makes of the time of each of them, `[1, F]`.
        states: of the estimator at each of them; None: nothing was before and nothing follows.
    """

    x: Tensor
    mu: Tensor
    mask: Tensor | None
    spks: Tensor
    cond: Tensor
    streaming: bool
    lengths: list[float]
    times: list[Tensor]
    states: list[State] | None

    @property
    def done(self) -> bool:
        return not self.lengths


class CausalConditionalCFM(nn.Module):
    """Solves the flow with classifier-free guidance, chunk by chunk if given a state.

    State: `offset`, the frames made so far (an int); made with the first chunk, `steps`, one state of the estimator for
    each Euler step, and `times`, what the estimator makes of the time of each of them. If the estimator has
    `new_stream`, there is `stream` instead of `steps`, of all of them.

    Args:
        in_channels, n_spks, spk_emb_dim: unused; the estimator knows its sizes.
        cfm_params: `inference_cfg_rate`, `training_cfg_rate`, `sigma_min`; `n_timesteps`, the Euler steps, which no
            published model gives; `reg_loss_type` is unused.

    Raises:
        ModelDirectoryError: another solver or time schedule, or a number of steps that cannot be.
    """

    rand_noise: Tensor

    def __init__(
        self,
        in_channels: int,
        cfm_params: Mapping[str, float | str],
        n_spks: int = 1,
        spk_emb_dim: int = 80,
        *,
        estimator: nn.Module,
    ) -> None:
        super().__init__()
        require(solver=(cfm_params["solver"], "euler"), t_scheduler=(cfm_params["t_scheduler"], "cosine"))
        self.n_timesteps = _checked_steps(cfm_params.get("n_timesteps", 10))
        self.sigma_min = cfm_params["sigma_min"]
        self.training_cfg_rate = cfm_params["training_cfg_rate"]
        self.inference_cfg_rate = cfm_params["inference_cfg_rate"]
        self.estimator = estimator
        noise = torch.randn(1, 80, MAX_FRAMES, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        self.register_buffer("rand_noise", noise, persistent=False)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        if hasattr(self.estimator, "new_stream"):
            return {"offset": 0, "stream": self.estimator.new_stream(self.n_timesteps)}
        return {"offset": 0, "steps": {}}

    def forward(
        self,
        mu: Tensor,
        mask: Tensor | None,
        n_timesteps: int | None = None,
        temperature: float = 1.0,
        *,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        state: State | None = None,
    ) -> Tensor:
        """Mel `[B, 80, T]` of the frames fed now; the arguments are those of `begin`."""
        trajectory = self.begin(
            mu, mask, n_timesteps, temperature, spks=spks, cond=cond, streaming=streaming, state=state
        )
        return self.solve(trajectory)

    def begin(
        self,
        mu: Tensor,
        mask: Tensor | None,
        n_timesteps: int | None = None,
        temperature: float = 1.0,
        *,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        state: State | None = None,
    ) -> Trajectory:
        """The frames fed now, as noise.

        Args:
            mu: `[B, 80, T]`, what the tokens say.
            mask: `[B, 1, T]`, nonzero where a frame is not padding; None: no padding.
            n_timesteps: Euler steps, the same for all chunks of a stream; None: as many as the model directory says.
            temperature: factor of the noise.
            spks: `[B, 80]`, the projected speaker embedding.
            cond: `[B, 80, T]`, the prompt's mel, 0 after it.
            streaming: use the estimator's chunk mask.
            state: of the frames fed before; None: there are none, and none will follow.

        Raises:
            InvalidRequestError: more frames than there is noise for, or another number of steps than before.
            BackendFailedError: no memory is left for these frames.
        """
        batch, _, frames = mu.shape
        n_timesteps = self.n_timesteps if n_timesteps is None else n_timesteps
        start = 0 if state is None else state["offset"]
        if start + frames > self.rand_noise.shape[2]:
            raise InvalidRequestError(
                f"Prompt and speech together would be {(start + frames) / 50:.0f} s long; the longest possible is "
                f"{self.rand_noise.shape[2] / 50:.0f} s. Split the text into shorter pieces."
            )
        states = None if state is None else self._extend_state(state, frames, n_timesteps, 2 * batch, mu)

        def pair(given: Tensor) -> Tensor:
            return torch.cat([given, torch.zeros_like(given)])

        times, lengths = zip(*euler_steps(n_timesteps), strict=True)
        features = None if state is None else state.get("times")
        if features is None:
            features = torch.tensor(times, device=mu.device)
            if hasattr(self.estimator, "time_features"):
                features = self.estimator.time_features(features)
        if state is not None:
            state["times"] = features
        noise = self.rand_noise[:, :, start : start + frames].expand(batch, -1, -1) * temperature
        return Trajectory(
            x=noise.to(torch.promote_types(mu.dtype, torch.float32)),
            mu=pair(mu),
            mask=None if mask is None else torch.cat([mask, mask]),
            spks=pair(spks),
            cond=pair(cond),
            streaming=streaming,
            lengths=list(lengths),
            times=list(features.split(1)),
            states=states,
        )

    def solve(self, trajectory: Trajectory) -> Tensor:
        """All Euler steps that are left; mel `[B, 80, T]`."""
        while not trajectory.done:
            self.advance([trajectory])
        return trajectory.x

    def advance(self, trajectories: Sequence[Trajectory]) -> None:
        """One Euler step of each, in one batch.

        Several ones have as many frames (or the estimator has `velocities`, which fill up), no mask, states, and the
        same `streaming`; they may stand at different steps and have different pasts.
        """
        batch = [
            EstimatorInputs(
                x=x,
                mask=own.mask,
                mu=own.mu,
                t=own.times[0].expand(len(own.mu), *own.times[0].shape[1:]),
                spks=own.spks,
                cond=own.cond,
                state=None if own.states is None else own.states[0],
            )
            for own, x in zip(trajectories, _doubled(trajectories), strict=True)
        ]
        velocities = self._velocities(batch, trajectories[0].streaming)
        if _alike(trajectories):
            self._move(trajectories, velocities)
        else:
            for own, velocity in zip(trajectories, velocities, strict=True):
                self._move([own], [velocity])
        for own in trajectories:
            del own.lengths[0], own.times[0]
            if own.states is not None:
                del own.states[0]

    def _move(self, trajectories: Sequence[Trajectory], velocities: Sequence[Tensor]) -> None:
        """Go one step on; all have as many frames, so that it is a few operations for all of them."""
        guidance = self.inference_cfg_rate
        guided, unguided = torch.stack(list(velocities)).unflatten(1, (2, -1)).unbind(1)
        x = torch.stack([own.x for own in trajectories])
        lengths = torch.tensor([own.lengths[0] for own in trajectories], dtype=x.dtype)
        lengths = lengths.to(x.device, non_blocking=True)[:, None, None, None]
        moved = x + lengths * ((1 + guidance) * guided - guidance * unguided)
        for own, x in zip(trajectories, moved.unbind(), strict=True):
            own.x = x

    def _velocities(self, batch: Sequence[EstimatorInputs], streaming: bool) -> Sequence[Tensor]:
        states = [own.state for own in batch if own.state is not None]
        if states and "stream" in states[0]:
            return self.estimator.velocities(batch)
        state = stack_states(states) if len(states) > 1 else states[0] if states else None
        x, mu, t, spks, cond = (
            _joined([getattr(own, name) for own in batch]) for name in ("x", "mu", "t", "spks", "cond")
        )
        velocity = self.estimator(x, batch[0].mask, mu, t, spks, cond, streaming=streaming, state=state)
        if len(states) > 1:
            unstack_state(state, states)
        return velocity.split([len(own.mu) for own in batch])

    def _extend_state(self, state: State, frames: int, n_timesteps: int, batch_size: int, like: Tensor) -> list[State]:
        """The states of the estimator at each step, with room for the frames."""
        stream, steps = state.get("stream"), state.get("steps")
        if steps is not None and not steps:
            for index in range(n_timesteps):
                steps[str(index)] = init_state(self.estimator, batch_size, like.device, like.dtype)
        before = len(stream.tails if steps is None else steps)
        if before != n_timesteps:
            raise InvalidRequestError(
                f"This stream began with {before} flow steps and cannot go on with {n_timesteps}; "
                "give the same number for all of its chunks.",
                param="n_timesteps",
            )
        if stream is not None and not stream.reserve(frames):
            raise BackendFailedError("No memory is left for this stream; raise COSY_STREAM_MEMORY_MB.")
        state["offset"] += frames
        if steps is None:
            return [{"stream": stream, "step": index} for index in range(n_timesteps)]
        return [steps[str(index)] for index in range(n_timesteps)]

    def compute_loss(
        self, x1: Tensor, mask: Tensor, mu: Tensor, spks: Tensor, cond: Tensor, streaming: bool = False
    ) -> Tensor:
        """Mean squared error of the velocity at a random time, over the frames that are not padding.

        The minimum of the squared error is the mean velocity, which is the one that carries noise to mel.

        Args:
            x1: `[B, 80, T]`, the recorded mel; the others as in `forward`, `mask` float.
        """
        batch = x1.shape[0]
        t = 1 - torch.cos(torch.rand(batch, 1, 1, device=x1.device) * (math.pi / 2))
        z = torch.randn_like(x1)
        y = (1 - (1 - self.sigma_min) * t) * z + t * x1
        u = x1 - (1 - self.sigma_min) * z
        kept = (torch.rand(batch, 1, 1, device=x1.device) > self.training_cfg_rate).to(x1.dtype)
        velocity = self.estimator(y, mask, mu * kept, t[:, 0, 0], spks * kept[:, 0], cond * kept, streaming=streaming)
        return F.mse_loss(velocity * mask, u * mask, reduction="sum") / (mask.sum() * x1.shape[1])


def _checked_steps(count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_STEPS:
        raise ModelDirectoryError(f"n_timesteps is {count!r}; it must be a whole number from 1 to {_MOST_STEPS}.")
    return count


def _alike(trajectories: Sequence[Trajectory]) -> bool:
    return len({own.x.shape for own in trajectories}) == 1


def _doubled(trajectories: Sequence[Trajectory]) -> Sequence[Tensor]:
    """Where each is, `[2B, 80, T]`, for both halves of the guidance."""
    if not _alike(trajectories):
        return [torch.cat([own.x, own.x]).to(own.mu.dtype) for own in trajectories]
    x = torch.stack([own.x for own in trajectories]).to(trajectories[0].mu.dtype)
    return torch.cat([x, x], dim=1).unbind()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
