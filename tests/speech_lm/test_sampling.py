from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cosy_engine.errors import InvalidRequestError
from cosy_engine.speech_lm.sampling import (
    GREEDY,
    RasSampler,
    SamplingSettings,
    choose,
    draw,
    nucleus_candidates,
    ras_distribution,
    ras_two_step,
    uniform_numbers,
)

PUBLISHED = SamplingSettings()


def scores_of(probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def distribution(scores: Tensor, recent: list[int], settings: SamplingSettings) -> Tensor:
    return ras_distribution(scores.unsqueeze(0), torch.tensor([recent or [-1]]), settings)[0]


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square goodness of fit; outcomes expected fewer than five times are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)]).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def two_step_counts(scores: Tensor, recent: list[int], settings: SamplingSettings, draws: int) -> Tensor:
    """`draws` runs of the two-step procedure, all first steps at once and then all second steps."""
    generator = torch.Generator().manual_seed(7)
    ids, weights = nucleus_candidates(scores, settings.top_p, settings.top_k)
    first = ids[torch.multinomial(weights, draws, replacement=True, generator=generator)]
    outcomes = []
    for value in ids.tolist():
        chosen = first[first == value]
        if len(chosen) and recent[-settings.win_size :].count(value) >= settings.win_size * settings.tau_r:
            others = scores.index_fill(0, torch.tensor([value]), float("-inf")).softmax(dim=0)
            chosen = torch.multinomial(others, len(chosen), replacement=True, generator=generator)
        outcomes.append(chosen)
    return torch.cat(outcomes).bincount(minlength=len(scores))


CASES = {
    "no history": (scores_of([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]), [], PUBLISHED),
    "one repeat": (scores_of([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]), [1, 6, 6], PUBLISHED),
    "several repeats": (scores_of([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]), [0, 1, 0, 2, 1, 0], PUBLISHED),
    "whole nucleus repeats": (scores_of([0.5, 0.2, 0.15, 0.1, 0.05]), [0, 1, 2], PUBLISHED),
    "ties across the edge": (scores_of([0.05] * 4 + [0.2] * 4), [5, 7], SamplingSettings(0.5, 25, 10, 0.1)),
    "uniform, cut by top_k": (torch.zeros(40), [3, 24, 30], PUBLISHED),
    "three repeats needed": (
        scores_of([0.3, 0.3, 0.2, 0.1, 0.1]),
        [0, 0, 1, 1, 1, 2, 0],
        SamplingSettings(0.9, 25, 10, 0.3),
    ),
    "short window": (scores_of([0.5, 0.3, 0.2]), [0, 0, 0, 0, 1, 2], SamplingSettings(1.0, 25, 2, 0.5)),
    "nearly certain and repeated": (torch.tensor([30.0, 1.0, 0.5, 0.0]), [0], PUBLISHED),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_fits_the_two_step_procedure(name: str) -> None:
    scores, recent, settings = CASES[name]
    counts = two_step_counts(scores, recent, settings, 200_000)
    closed = distribution(scores, recent[-settings.win_size :], settings)
    assert closed.sum().item() == pytest.approx(1)
    assert p_value(counts, closed) > 1e-3


def test_the_statistic_tells_ras_from_a_plain_nucleus() -> None:
    scores, recent, settings = CASES["several repeats"]
    counts = two_step_counts(scores, recent, settings, 50_000)
    assert p_value(counts, distribution(scores, [], settings)) < 1e-6


def test_single_draws_of_the_two_step_procedure_fit_too() -> None:
    scores, recent, settings = CASES["ties across the edge"]
    generator = torch.Generator().manual_seed(11)
    draws = torch.tensor([ras_two_step(scores, recent, settings, generator) for _ in range(8_000)])
    assert p_value(draws.bincount(minlength=len(scores)), distribution(scores, recent, settings)) > 1e-3


def test_draws_fit_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.2, 0.05, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    drawn = draw(probabilities.expand(50_000, 7), uniform_numbers(generator, 50_000))
    counts = drawn.bincount(minlength=7)
    assert counts[probabilities == 0].sum() == 0
    assert p_value(counts, probabilities) > 1e-3


def test_random_numbers_are_the_same_at_once_and_one_by_one() -> None:
    at_once = uniform_numbers(torch.Generator().manual_seed(4), 100)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(at_once, torch.cat([uniform_numbers(generator, 1) for _ in range(100)]))


def test_distribution_by_hand() -> None:
    # Nucleus {0, 1} with weights 5/8 and 3/8; 0 repeats, so its 5/8 goes to 1 and 2 as 3:2.
    got = distribution(scores_of([0.5, 0.3, 0.2]), [0], PUBLISHED)
    torch.testing.assert_close(got, torch.tensor([0, 3 / 8 + 5 / 8 * 0.6, 5 / 8 * 0.4]).double(), atol=1e-6, rtol=0)


def test_rows_are_chosen_by_their_own_settings_and_numbers() -> None:
    generator = torch.Generator().manual_seed(6)
    settings = [PUBLISHED, GREEDY, SamplingSettings(0.95, 60, 4, 0.5), SamplingSettings(1.0, 3, 2, 0.1)]
    logits = torch.randn(4, 60, generator=generator)
    recent = logits.topk(4).indices[:, [0, 1, 0, 3]]
    uniform = uniform_numbers(generator, 4)
    given = torch.tensor(
        [[u, s.top_p, s.top_k, s.win_size * s.tau_r, 57] for u, s in zip(uniform.tolist(), settings, strict=True)]
    ).double()
    given[:, 0] = uniform
    logits[:, 57:] = 9.0
    got = choose(logits, torch.cat([given, recent], dim=1))
    allowed = logits.index_fill(1, torch.arange(57, 60), float("-inf"))
    expected = [
        int(draw(ras_distribution(allowed[i : i + 1], recent[i : i + 1], settings[i]), uniform[i : i + 1]))
        for i in range(4)
    ]
    assert got.argmax(dim=1).tolist() == expected
    assert got.isinf().sum(dim=1).tolist() == [60] * 4


def test_scores_that_are_not_numbers_give_the_id_after_the_last() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2], logits[2, 0] = float("nan"), float("inf")
    got = choose(logits, torch.tensor([[0.0, 0.8, 25, 1.0, 5, -1]] * 3).double())
    assert got.argmax(dim=1).tolist() == [0, 5, 5]


def test_an_id_that_is_none_of_the_head_counts_as_none_before() -> None:
    """vLLM may begin a step after one whose scores were not numbers before it has seen that."""
    scores = torch.randn(2, 9)
    before = torch.tensor([[3, 9, 9, -1], [9, 9, 9, 9]])
    none = torch.tensor([[3, -1, -1, -1], [-1, -1, -1, -1]])
    assert torch.equal(ras_distribution(scores, before, PUBLISHED), ras_distribution(scores, none, PUBLISHED))


def test_batch_rows_are_independent() -> None:
    torch.manual_seed(5)
    scores = torch.randn(4, 50)
    recent = torch.tensor([[-1, -1, -1], [4, 4, 4], [7, 0, 49], [-1, 2, 2]])
    batch = ras_distribution(scores, recent, PUBLISHED)
    rows = [ras_distribution(row[None], window[None], PUBLISHED)[0] for row, window in zip(scores, recent, strict=True)]
    torch.testing.assert_close(batch, torch.stack(rows))


def test_excluded_ids_stay_excluded() -> None:
    scores = scores_of([0.4, 0.3, 0.2, 0.1]).index_fill(0, torch.tensor([1, 3]), float("-inf"))
    got = distribution(scores, [0], PUBLISHED)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 1.0, 0.0]).double())


def test_the_only_possible_id_may_repeat() -> None:
    scores = torch.tensor([float("-inf"), 0.0, float("-inf")])
    torch.testing.assert_close(distribution(scores, [1, 1], PUBLISHED), torch.tensor([0.0, 1.0, 0.0]).double())


def test_greedy_settings_take_the_likeliest_again_and_again() -> None:
    scores = scores_of([0.1, 0.4, 0.3, 0.2])
    sampler = RasSampler(GREEDY, seed=0)
    assert [sampler(scores, [1] * count) for count in range(5)] == [1] * 5


def test_seed_decides_the_draws() -> None:
    scores = torch.zeros(1000)
    one, same, other = RasSampler(PUBLISHED, 1), RasSampler(PUBLISHED, 1), RasSampler(PUBLISHED, 2)
    drawn = [[sampler(scores, []) for _ in range(20)] for sampler in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("top_p", "top_k", "wanted"),
    [(0.5, 25, [1]), (0.51, 25, [1, 2]), (0.8, 25, [1, 2, 0]), (1.0, 2, [1, 2]), (1.0, 25, [1, 2, 0, 3])],
)
def test_nucleus_takes_the_id_that_crosses_top_p(top_p: float, top_k: int, wanted: list[int]) -> None:
    ids, probabilities = nucleus_candidates(scores_of([0.125, 0.5, 0.25, 0.125]), top_p, top_k)
    assert ids.tolist() == wanted
    torch.testing.assert_close(probabilities, torch.tensor([0.125, 0.5, 0.25, 0.125])[ids])


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0.0), ("top_p", 1.5), ("top_k", 0), ("win_size", 0), ("tau_r", 0.0)]
)
def test_senseless_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        SamplingSettings(**{name: value})
