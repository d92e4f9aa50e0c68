from __future__ import annotations

from math import pi

import pytest
import torch

from cosy_engine.modules.source import (
    BLOCK,
    SourceModule,
    draw_public_noise,
    gaussian_noise,
    public_uniform_noise,
)
from cosy_engine.modules.streaming import State, stack_states

CPU = torch.device("cpu")


def make_source(causal: bool) -> SourceModule:
    torch.manual_seed(0)
    return SourceModule(24000, 480, 9, 0.1, 0.003, 10, causal)


def test_sines_run_at_the_pitch_and_its_harmonics_after_twenty_seconds_too() -> None:
    """Linear phase from frame centre to frame centre; the first and last half frame stand still."""
    frames, f0 = 1000, 123.4
    sines, voiced = make_source(causal=False).sines(torch.full((1, frames), f0))
    assert bool(voiced.all())
    per_sample = (torch.tensor(f0) * torch.arange(1, 10) / 24000 % 1).double()  # cycles
    sample = torch.arange(frames * 480).double()
    since_centre = (sample + 0.5 - 240).clamp(0, (frames - 1) * 480)
    want = torch.sin(2 * pi * (480 + since_centre[:, None]) * per_sample)
    torch.testing.assert_close(sines[0].double(), want, atol=2e-4, rtol=0)


def test_causal_sines_are_constant_within_a_frame() -> None:
    f0 = torch.tensor([[100.0, 200.0, 5.0]])
    sines, voiced = make_source(causal=True).sines(f0)
    frames = sines.view(3, 480, 9)
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    cycles = torch.tensor([100.0, 300.0, 305.0]).double() * 480 / 24000
    torch.testing.assert_close(frames[:, 0, 0].double(), torch.sin(2 * pi * cycles), atol=1e-5, rtol=0)
    assert voiced.view(3, 480).all(dim=1).tolist() == [True, True, False]


@pytest.mark.parametrize("causal", [False, True])
def test_unvoiced_frames_are_noise_of_a_third_of_the_amplitude(causal: bool) -> None:
    source = make_source(causal)
    with torch.no_grad():
        source.l_linear.weight.zero_()[0, 0] = 1  # only the fundamental passes
        source.l_linear.bias.zero_()
    noise = torch.randn(1, 4800, 9)
    got = source(torch.full((1, 10), 9.9), noise=noise)
    torch.testing.assert_close(got[0, 0], torch.tanh(0.1 / 3 * noise[0, :, 0]))


@pytest.mark.parametrize("causal", [False, True])
def test_excitation_does_not_depend_on_the_chunks(causal: bool) -> None:
    source = make_source(causal)
    f0 = torch.rand(1, 60).mul(300).where(torch.rand(1, 60) > 0.3, 0)
    whole = source(f0)
    state = {}
    parts = [source(f0[:, i : i + 7], state, finalize=i == 56) for i in range(0, 60, 7)]
    assert whole.shape == (1, 1, 60 * 480)
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_may_end_within_a_call(causal: bool) -> None:
    """The phase stands still after the last frame's centre, as when the row is finalized there."""
    source, ends = make_source(causal), [0, 0, 1, 1, 7, 8, 11, 1000]
    f0 = torch.stack([torch.tensor([300.0, 0.0, 0.0, 200.0]).repeat(8)[row : row + 24] for row in range(8)])
    states: list[State] = [{"noise_position": torch.tensor([100 * row])} for row in range(8)]
    for row, state in zip(f0.split(1), states, strict=True):
        source(row[:, :12], state, finalize=False)
    state = stack_states(states)
    state["end"] = torch.tensor(ends)
    got = source(f0[:, 12:], state, finalize=False)
    for row, own, end, excitation in zip(f0.split(1), states, ends, got, strict=True):
        want = source(row[:, 12 : 12 + end], own, finalize=end <= 12)[0]
        torch.testing.assert_close(excitation[:, : want.shape[1]], want, atol=1e-6, rtol=0)


def test_fixed_noise_continues_across_blocks_and_repeats() -> None:
    across = gaussian_noise(BLOCK - 2, 4, CPU)
    assert torch.equal(across[:2], gaussian_noise(BLOCK - 2, 2, CPU))
    assert torch.equal(across[2:], gaussian_noise(0, 2, CPU))
    assert gaussian_noise(5, 0, CPU).shape == (0, 9)
    values = gaussian_noise(0, BLOCK, CPU)
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01
    uniform = public_uniform_noise(BLOCK - 1000, 2000, CPU)
    assert 0 <= float(uniform.min()) and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.02
    assert torch.equal(uniform[1000:], public_uniform_noise(BLOCK, 1000, CPU))


def test_seeds_start_elsewhere_in_the_gaussian_noise_only() -> None:
    source, causal_source = make_source(causal=False), make_source(causal=True)
    starts = {source.noise_position(seed).item() for seed in range(1000)}
    assert len(starts) == 1000 and all(0 <= start < BLOCK for start in starts)
    assert {causal_source.noise_position(seed).item() for seed in range(1000)} == {0}


def test_public_noise_has_the_published_values_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = public_uniform_noise(0, 1, CPU)[0, :4]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(
        first,
        torch.tensor([0.9228259921073914, 0.477447509765625, 0.8270518183708191, 0.2834571599960327]),
        atol=0,
        rtol=0,
    )


def test_public_draws_have_the_recorded_values() -> None:
    """One harmonic after the other; the numbers are the public code's for seed 555 and 33 frames."""
    torch.manual_seed(555)
    noise = draw_public_noise(15840)
    assert noise.shape == (1, 15840, 9)
    assert noise[0, :3, 0].tolist() == pytest.approx([-1.06282639503479, 0.6064104437828064, 0.09149428457021713])
    assert float(noise[0, -1, 8]) == pytest.approx(0.5004246234893799)
