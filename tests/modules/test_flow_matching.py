from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cosy_engine.errors import InvalidRequestError, ModelDirectoryError
from cosy_engine.modules.flow_matching import MAX_FRAMES, CausalConditionalCFM, euler_steps
from cosy_engine.modules.streaming import State, init_state
from tests.modules.small_flow import CFM_PARAMS

# torch.manual_seed(0); torch.randn(1, 80, 15000)[0, 0, :4]
FIRST_NOISE = [-1.1258398294448853, -1.152360200881958, -0.2505785822868347, -0.4338788092136383]


class Mean(nn.Module):
    """A velocity that only depends on `mu`."""

    def forward(self, x, mask, mu, t, spks, cond, streaming=False, state: State | None = None) -> Tensor:
        return mu


def _cfm(estimator: nn.Module | None = None) -> CausalConditionalCFM:
    return CausalConditionalCFM(240, CFM_PARAMS, estimator=estimator or Mean())


def _conditions(frames: int, batch: int = 1) -> dict[str, Tensor]:
    return {"spks": torch.zeros(batch, 80), "cond": torch.zeros(batch, 80, frames)}


def test_noise_is_the_public_one_and_not_a_weight() -> None:
    cfm = _cfm()
    assert cfm.rand_noise.shape == (1, 80, MAX_FRAMES)
    assert cfm.rand_noise[0, 0, :4].tolist() == FIRST_NOISE
    assert not cfm.state_dict()


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _cfm()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("count", [1, 5, 10])
def test_euler_steps_follow_the_cosine_grid_to_one(count: int) -> None:
    steps = euler_steps(count)
    assert [t for t, _ in steps] == pytest.approx(
        [1 - math.cos(math.pi / 2 * k / count) for k in range(count)], abs=1e-6
    )
    assert sum(dt for _, dt in steps) == pytest.approx(1, abs=1e-6)


def test_guidance_moves_away_from_the_unconditioned_velocity() -> None:
    cfm = _cfm()
    mel = cfm(torch.ones(1, 80, 6), None, 4, **_conditions(6))
    torch.testing.assert_close(mel, cfm.rand_noise[:, :, :6] + 1.7)
    mel = cfm(torch.ones(1, 80, 6), None, 4, temperature=0.5, **_conditions(6))
    torch.testing.assert_close(mel, 0.5 * cfm.rand_noise[:, :, :6] + 1.7)


def test_each_chunk_takes_its_part_of_the_noise() -> None:
    cfm = _cfm()
    state = init_state(cfm, 1, torch.device("cpu"), torch.float32)
    for start, end in [(0, 3), (3, 10), (10, 11)]:
        mel = cfm(torch.zeros(1, 80, end - start), None, 2, **_conditions(end - start), state=state)
        assert torch.equal(mel, cfm.rand_noise[:, :, start:end])


def test_a_16_bit_model_sums_up_in_32_bits() -> None:
    conditions = {name: value.bfloat16() for name, value in _conditions(4).items()}
    mel = _cfm()(torch.full((1, 80, 4), 0.01, dtype=torch.bfloat16), None, 10, **conditions)
    assert mel.dtype == torch.float32
    torch.testing.assert_close(mel, _cfm().rand_noise[:, :, :4] + 0.017, atol=1e-4, rtol=0)


def test_more_frames_than_noise_is_the_callers_error() -> None:
    cfm = _cfm()
    state = init_state(cfm, 1, torch.device("cpu"), torch.float32)
    cfm(torch.zeros(1, 80, MAX_FRAMES), None, 1, **_conditions(MAX_FRAMES), state=state)
    with pytest.raises(InvalidRequestError, match="300 s"):
        cfm(torch.zeros(1, 80, 1), None, 1, **_conditions(1), state=state)
    with pytest.raises(InvalidRequestError, match="300 s"):
        cfm(torch.zeros(1, 80, MAX_FRAMES + 1), None, 1, **_conditions(MAX_FRAMES + 1))


def test_a_stream_keeps_its_number_of_steps() -> None:
    cfm = _cfm()
    state = init_state(cfm, 1, torch.device("cpu"), torch.float32)
    cfm(torch.zeros(1, 80, 2), None, 4, **_conditions(2), state=state)
    with pytest.raises(InvalidRequestError) as raised:
        cfm(torch.zeros(1, 80, 2), None, 5, **_conditions(2), state=state)
    assert raised.value.param == "n_timesteps"


def test_another_solver_is_refused() -> None:
    with pytest.raises(ModelDirectoryError, match="solver"):
        CausalConditionalCFM(240, {**CFM_PARAMS, "solver": "midpoint"}, estimator=Mean())


def test_a_model_directory_may_say_how_many_steps() -> None:
    cfm = CausalConditionalCFM(240, {**CFM_PARAMS, "n_timesteps": 4}, estimator=Mean())
    given = cfm.begin(torch.zeros(1, 80, 2), None, **_conditions(2))
    usual = _cfm().begin(torch.zeros(1, 80, 2), None, **_conditions(2))
    assert (len(given.lengths), len(usual.lengths)) == (4, 10)
    assert len(cfm.begin(torch.zeros(1, 80, 2), None, 3, **_conditions(2)).lengths) == 3


@pytest.mark.parametrize("count", [0, 101, 2.5, "6", True, None])
def test_an_impossible_number_of_steps_is_refused(count: object) -> None:
    with pytest.raises(ModelDirectoryError, match="n_timesteps"):
        CausalConditionalCFM(240, {**CFM_PARAMS, "n_timesteps": count}, estimator=Mean())


def test_the_true_velocity_has_no_loss_whatever_the_padding_says() -> None:
    x1 = torch.randn(3, 80, 9)
    mask = torch.ones(3, 1, 9)
    mask[2, :, 5:] = 0

    class Oracle(nn.Module):
        def forward(self, y, mask, mu, t, spks, cond, streaming=False) -> Tensor:
            t = t[:, None, None]
            noise = (y - t * x1) / (1 - (1 - 1e-6) * t)
            return torch.where(mask.bool(), x1 - (1 - 1e-6) * noise, torch.full_like(y, 100.0))

    torch.manual_seed(0)
    loss = _cfm(Oracle()).compute_loss(x1, mask, torch.zeros_like(x1), torch.zeros(3, 80), torch.zeros_like(x1))
    assert loss.item() < 1e-6


def test_a_fifth_of_the_training_items_lose_all_conditions() -> None:
    seen: list[Tensor] = []

    class Watcher(nn.Module):
        def forward(self, y, mask, mu, t, spks, cond, streaming=False) -> Tensor:
            assert torch.equal(mu[:, 0, 0], spks[:, 0]) and torch.equal(mu[:, 0, 0], cond[:, 0, 0])
            seen.append(mu[:, 0, 0])
            return y

    torch.manual_seed(0)
    ones = torch.ones(2000, 80, 1)
    _cfm(Watcher()).compute_loss(ones, torch.ones(2000, 1, 1), ones, torch.ones(2000, 80), ones)
    assert set(seen[0].tolist()) == {0.0, 1.0}
    assert seen[0].mean().item() == pytest.approx(0.8, abs=0.03)
