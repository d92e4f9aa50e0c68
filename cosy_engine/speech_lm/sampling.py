"""Repetition-aware sampling (RAS): as a two-step procedure, and as the one distribution that it amounts to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosy_engine.config import SamplingSettings

GREEDY = SamplingSettings(top_p=1.0, top_k=1, win_size=1, tau_r=2.0)
"""Always the likeliest id, repeated or not."""


def nucleus_candidates(scores: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The ids among which the first draw chooses, likeliest first, and their probabilities (not normalised).

    An id is in while those before it sum to less than `top_p`, so the one that crosses it is in too; of equal ones
    the lower id comes first. `scores` [V] are logits or log-probabilities.
    """
    probabilities, ids = scores.softmax(dim=0).sort(descending=True, stable=True)
    total = torch.zeros_like(probabilities[0])
    count = 0
    while count < min(top_k, len(ids)) and total < top_p:
        total = total + probabilities[count]
        count += 1
    return ids[:count], probabilities[:count]


def nucleus_sample(scores: Tensor, top_p: float, top_k: int, generator: torch.Generator | None = None) -> int:
    """One id drawn from the nucleus of `scores` [V]."""
    ids, probabilities = nucleus_candidates(scores, top_p, top_k)
    return int(ids[torch.multinomial(probabilities, 1, replacement=True, generator=generator)])


def ras_two_step(
    scores: Tensor, decoded: Sequence[int], settings: SamplingSettings, generator: torch.Generator | None = None
) -> int:
    """One id as the public code draws it, in one or two steps, with its random numbers in its order.

    Args:
        scores: logits or log-probabilities [V], on the CPU.
        decoded: the ids so far, oldest first.
        generator: torch's global one when None.
    """
    first = nucleus_sample(scores, settings.top_p, settings.top_k, generator)
    if decoded[-settings.win_size :].count(first) < settings.win_size * settings.tau_r:
        return first
    others = scores.index_fill(0, torch.tensor([first]), float("-inf"))
    return int(torch.multinomial(others.softmax(dim=0), 1, replacement=True, generator=generator))


def ras_distribution(scores: Tensor, recent: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities of the outcomes of `ras_two_step`, for a batch, in closed form.

    With p the whole distribution, n the normalised nucleus and R the ids repeated too often,
    `P(x) = n(x) [x not in R] + sum over r in R, r != x, of n(r) p(x) / (1 - p(r))`.

    Args:
        scores: logits or log-probabilities [B, V]; -inf excludes an id.
        recent: the last ids of each row [B, W], W at most `settings.win_size`, -1 where there are none yet.

    Returns:
        float64 [B, V], rows summing to 1. An id without any alternative keeps its probability.
    """
    return _ras_distribution(scores, recent, settings.top_p, settings.top_k, settings.win_size * settings.tau_r)


def _ras_distribution(
    scores: Tensor, recent: Tensor, top_p: float | Tensor, top_k: int | Tensor, too_often: float | Tensor
) -> Tensor:
    """`ras_distribution` with settings that are the same for all rows, or [B, 1]; `too_often` is `win_size * tau_r`."""
    p = scores.double().softmax(dim=-1)
    n = _nucleus(p, top_p, top_k)

    occurrences = recent.unsqueeze(-1) == recent.unsqueeze(-2)
    ids = p.shape[-1]  # vLLM's next step may begin before it has seen that the last id says "not a number"
    repeats = (occurrences.sum(-1) >= too_often) & (recent >= 0) & (recent < ids)
    index = recent.clamp(0, ids - 1)
    # 1 - p loses all digits where p is nearly 1, which only the likeliest id can be: sum the others for that one.
    top = p.argmax(dim=-1, keepdim=True)
    rest_of_top = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    rest = torch.where(index == top, rest_of_top, 1 - p.gather(-1, index))
    repeats &= rest > 0

    # Drawing r moves its n(r) to all others in proportion to p. An id occurring twice in `recent` counts once: scatter
    # writes the same value again. Entries that do not repeat go to an extra last column, which is cut off.
    column = torch.where(repeats, index, p.shape[-1])
    per_rest = torch.where(repeats, n.gather(-1, index) / rest.clamp(min=torch.finfo(p.dtype).tiny), 0.0)
    moved = p.new_zeros(p.shape[0], p.shape[1] + 1).scatter(-1, column, per_rest)[:, :-1]
    kept = n.new_ones(p.shape[0], p.shape[1] + 1).scatter(-1, column, 0.0)[:, :-1] * n
    return kept + p * (moved.sum(-1, keepdim=True) - moved).clamp(min=0)


def _nucleus(p: Tensor, top_p: float | Tensor, top_k: int | Tensor) -> Tensor:
    """Normalised nucleus distribution of `p` [B, V]: `nucleus_candidates` without a sort of the vocabulary."""
    widest = top_k if isinstance(top_k, int) else int(top_k.max())
    best = p.topk(min(widest, p.shape[-1]), dim=-1).values
    place = torch.arange(best.shape[-1], device=p.device)
    count = ((best.cumsum(-1) - best < top_p) & (place < top_k)).sum(-1, keepdim=True)
    least = best.gather(-1, count - 1)
    above, equal = p > least, p == least
    first_equal = equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    kept = torch.where(above | first_equal, p, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One id [B] from each row of `probabilities` [B, V], decided by `uniform` numbers [B] in 0..1 (1 excluded)."""
    cumulative = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[:, -1:], right=True)
    return chosen.squeeze(-1)


UNIFORM, TOP_P, TOP_K, TOO_OFTEN, EXCLUDED, RECENT = range(6)
"""Columns of what `choose` takes for each row: the random number, `top_p`, `top_k`, `win_size * tau_r`, the first id
that is excluded (as are all after it), and from `RECENT` on the last ids, in any order, -1 where there are none yet."""


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """Draw the next id of each row from its own settings and its own random number.

    Args:
        logits: float32 [B, V].
        rows: float64 [B, RECENT + W].

    Returns:
        float32 [B, V + 1]: 0 for the chosen id and -inf for all others. The chosen id is V where the logits are not
        numbers.
    """
    size = logits.shape[-1]
    uniform, top_p, top_k, too_often, excluded = rows[:, :RECENT].split(1, dim=-1)
    broken = ~logits.sum(dim=-1, keepdim=True).isfinite()
    scores = logits.masked_fill(broken, 0.0)
    scores = scores.masked_fill(torch.arange(size, device=logits.device) >= excluded, float("-inf"))
    chosen = draw(_ras_distribution(scores, rows[:, RECENT:].long(), top_p, top_k, too_often), uniform.squeeze(-1))
    chosen = torch.where(broken, size, chosen.unsqueeze(-1))
    return logits.new_full((len(logits), size + 1), float("-inf")).scatter_(-1, chosen, 0.0)


def uniform_numbers(generator: torch.Generator, count: int) -> Tensor:
    """Numbers [count] in 0..1 (1 excluded), float64 on the CPU; the same ones whether drawn at once or one by one."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


class RasSampler:
    """Chooses the ids of one request, from its own seed."""

    def __init__(self, settings: SamplingSettings, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, scores: Tensor, decoded: Sequence[int]) -> int:
        """The next id after `decoded`, for log-probabilities [V] on the CPU."""
        recent = torch.tensor([[-1, *decoded[-self.settings.win_size :]]])
        probabilities = ras_distribution(scores.unsqueeze(0), recent, self.settings)
        return int(draw(probabilities, uniform_numbers(self.generator, 1)))
