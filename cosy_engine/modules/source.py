"""The excitation signal of the vocoder: sines at the harmonics of the pitch, plus noise.

Follows the second sine generator of the public CosyVoice code (the one for 24 kHz). The phase is summed in float64 and
carried modulo one cycle, where the public code lets a float32 grow to thousands of radians.

Noise is data, never a draw in the forward pass: a `Noise` gives the values of any stretch of a fixed sequence, so the
noise at a sample does not depend on how the mel was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import pi

import torch
from torch import Tensor, nn

from cosy_engine.modules.streaming import State
from cosy_engine.modules.streaming_layers import comes_before

Noise = Callable[[int, int, torch.device], Tensor]  # (first sample, number of samples, device) -> [samples, channels]

BLOCK = 240_000  # samples (10 s) drawn at a time
PUBLIC_BLOCKS = 30  # the public noise buffer holds 300 s


def gaussian_noise(start: int, length: int, device: torch.device, *, channels: int = 9) -> Tensor:
    """A stretch [length, channels] of one fixed standard normal sequence, which repeats after 10 s."""
    return _stretch(partial(_gaussian_block, channels, device), 1, start, length)


def public_uniform_noise(start: int, length: int, device: torch.device, *, channels: int = 9) -> Tensor:
    """A stretch [length, channels] of CosyVoice3's fixed noise, uniform in [0, 1); it repeats after 300 s.

    The noise is not in the checkpoint. The public code draws it while it builds the model, right after it has seeded
    the global generator, hence it can be had again: see `public_generator_state`. Only as much is drawn as is used.
    """
    return _stretch(partial(_public_block, channels, device), PUBLIC_BLOCKS, start, length)


def draw_public_noise(samples: int, channels: int = 9) -> Tensor:
    """What CosyVoice2's public source module draws from the global generator in one call.

    Returns:
        Standard normal [1, samples, channels]. The memory is laid out as (1, channels, samples), which decides the
        order of the values. The two draws beside it have no effect and are made for the generator's sake.
    """
    torch.rand(1, channels)
    noise = torch.randn_like(torch.empty(1, channels, samples).transpose(1, 2))
    torch.randn(1, samples, 1)
    return noise


@lru_cache(maxsize=1)
def public_generator_state() -> tuple[Tensor, Tensor]:
    """Replay what the public CosyVoice3 configuration draws before the vocoder's noise.

    These are, after seeding with 0: the flow's noise, its two input layers, the pitch predictor, the initial phases.

    Returns:
        The initial phases [1, 9] (they never reach the output) and the state of the CPU generator after them.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(0)
        torch.randn(1, 80, 15000)
        nn.Embedding(6561, 80)
        nn.Linear(192, 80)
        nn.Conv1d(80, 512, 4)
        for _ in range(4):
            nn.Conv1d(512, 512, 3)
        nn.Linear(512, 1)
        initial_phase = torch.rand(1, 9)
        initial_phase[:, 0] = 0
        return initial_phase, torch.get_rng_state()


def _stretch(block: Callable[[int], Tensor], n_blocks: int, start: int, length: int) -> Tensor:
    parts = []
    for index in range(start // BLOCK, (start + length - 1) // BLOCK + 1):
        first = index * BLOCK
        parts.append(block(index % n_blocks)[max(0, start - first) : start + length - first])
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else block(0)[:0]


@lru_cache
def _gaussian_block(channels: int, device: torch.device, index: int) -> Tensor:
    return torch.randn(BLOCK, channels, generator=torch.Generator().manual_seed(index), device="cpu").to(device)


@lru_cache(maxsize=2 * PUBLIC_BLOCKS)
def _public_block(channels: int, device: torch.device, index: int) -> Tensor:
    return _draw_public_block(channels, index)[0].to(device)


@lru_cache(maxsize=PUBLIC_BLOCKS)
def _draw_public_block(channels: int, index: int) -> tuple[Tensor, Tensor]:
    """Block `index` of the public noise, and the state of the generator after it."""
    generator = torch.Generator()
    generator.set_state(_draw_public_block(channels, index - 1)[1] if index else public_generator_state()[1])
    return torch.rand(BLOCK, channels, generator=generator, device="cpu"), generator.get_state()


class SourceModule(nn.Module):
    """Pitch at frame rate -> excitation at sample rate.

    Args:
        hop: samples a frame.
        harmonics: number of sines, the fundamental included.
        sine_amp, noise_std: amplitude of the sines; of the noise where voiced (it is sine_amp / 3 elsewhere).
        voiced_threshold: Hz above which a frame is voiced.
        causal: CosyVoice3's form. The phase stays constant within a frame and the noise is the public uniform one,
            the same for every seed. Otherwise CosyVoice2's: the phase runs linearly from the centre of a frame to the
            centre of the next (so the second half of a frame waits for the next pitch), the noise is Gaussian and the
            seed says where in it to start.

    Attributes:
        noise: where the noise comes from; replace it to use other values.
    """

    def __init__(
        self,
        sampling_rate: int,
        hop: int,
        harmonics: int,
        sine_amp: float,
        noise_std: float,
        voiced_threshold: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.sampling_rate, self.hop, self.causal = sampling_rate, hop, causal
        self.sine_amp, self.noise_std, self.voiced_threshold = sine_amp, noise_std, voiced_threshold
        self.noise: Noise = partial(public_uniform_noise if causal else gaussian_noise, channels=harmonics)
        self.l_linear = nn.Linear(harmonics, 1)

    def ready(self, n: int) -> int:
        """Number of samples known after n pitch values."""
        return n * self.hop if self.causal else max(0, n * self.hop - self.hop // 2)

    def noise_position(self, seed: int) -> Tensor:
        """Where in the noise sequence a request with this seed starts, as the state has it: int64 [1] on the CPU."""
        return torch.tensor([0 if self.causal else seed * 104_729 % BLOCK])  # a prime: nearby seeds lie far apart

    def noise_from(self, positions: Tensor, samples: int, device: torch.device) -> Tensor:
        """Noise [B, samples, harmonics] from the positions [B] on."""
        return torch.stack([self.noise(position, samples, device) for position in positions.tolist()])

    def forward(
        self, f0: Tensor, state: State | None = None, *, finalize: bool = True, noise: Tensor | None = None
    ) -> Tensor:
        """f0 [B, T] in Hz, and optionally noise [B, at least T * hop, harmonics] -> [B, 1, T * hop]."""
        state = {} if state is None else state
        with torch.no_grad():
            sines, voiced = self.sines(f0, state, finalize=finalize)
            samples = sines.shape[1]
            if noise is None:
                positions = state.get("noise_position", self.noise_position(0))
                noise = self.noise_from(positions, samples, f0.device)
                state["noise_position"] = positions + samples
            noise_amp = torch.where(voiced, self.noise_std, self.sine_amp / 3)
            excitation = self.sine_amp * sines * voiced + noise_amp * noise[:, :samples]
        return torch.tanh(self.l_linear(excitation)).transpose(1, 2)

    def sines(self, f0: Tensor, state: State | None = None, *, finalize: bool = True) -> tuple[Tensor, Tensor]:
        """Unit sines [B, samples, harmonics] and which samples are voiced, bool [B, samples, 1].

        The state may have an `end` for each row; see streaming_layers.
        """
        state = {} if state is None else state
        end = state.pop("end", None)
        order = torch.arange(1, self.l_linear.in_features + 1, device=f0.device)
        steps = (f0[:, :, None] * order / self.sampling_rate % 1).double() * self.hop  # cycles in each frame
        if end is not None:
            steps = steps * comes_before(end, f0.shape[1])[:, :, None]
        cycles = steps.cumsum(1) + state.get("cycles", 0)  # phase at the centre of each frame
        is_start, held = "cycles" not in state, state.copy()
        if f0.shape[1]:
            state["f0"], state["cycles"] = f0[:, -1:], cycles[:, -1:] % 1
        if self.causal or "cycles" not in state:
            sines = torch.sin(2 * pi * (cycles % 1)).to(f0.dtype)
            return sines.repeat_interleave(self.hop, dim=1), self._voiced(f0)

        # From the centre of the last frame of the previous call to the centre of the last frame; the phase stands
        # still before the first centre and after the last.
        f0 = torch.cat([held.get("f0", f0[:, :1]), f0], dim=1)
        cycles = torch.cat([held.get("cycles", cycles[:, :1]), cycles], dim=1)
        if finalize:
            f0, cycles = torch.cat([f0, f0[:, -1:]], dim=1), torch.cat([cycles, cycles[:, -1:]], dim=1)
        weight = (torch.arange(self.hop, device=f0.device)[:, None] + 0.5) / self.hop
        start, step = (cycles[:, :-1] % 1).to(f0.dtype), cycles.diff(dim=1).to(f0.dtype)
        phase = (start[:, :, None] + weight * step[:, :, None]).flatten(1, 2)
        half = self.hop // 2
        first, end = half * is_start, phase.shape[1] - half * finalize
        return torch.sin(2 * pi * (phase[:, first:end] % 1)), self._voiced(f0)[:, half:-half][:, first:end]

    def _voiced(self, f0: Tensor) -> Tensor:
        return (f0 > self.voiced_threshold).repeat_interleave(self.hop, dim=1)[:, :, None]
