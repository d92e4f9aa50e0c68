"""`sampling.choose` as one Triton kernel, for vLLM on an NVIDIA GPU; nothing else here needs Triton.

The torch form is some eighty operations a step, more than vLLM launches for the model, which is in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosy_engine.speech_lm import sampling

_WARPS = 16  # a row; its values fill their registers


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """As `sampling.choose`, on one GPU; logits may be a part of wider rows, as those of a padded head are."""
    batch, size = logits.shape
    chosen = torch.empty(batch, size + 1, dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(size + 1)
    _choose[(batch,)](logits, logits.stride(0), rows, rows.shape[1], chosen, size, BLOCK=block, num_warps=_WARPS)
    return chosen


def agrees(device: torch.device, size: int) -> bool:
    """Whether this chooses the same ids of `size` as the torch form does, for some scores and settings."""
    generator = torch.Generator().manual_seed(0)
    batch, window = 8, 10
    logits = torch.randn(batch, size, generator=generator) * torch.linspace(0.1, 8.0, batch).unsqueeze(1)
    rows = torch.full((batch, sampling.RECENT + window), -1.0, dtype=torch.float64)
    rows[:, sampling.UNIFORM] = sampling.uniform_numbers(generator, batch)
    rows[:, sampling.TOP_P] = torch.tensor([0.8, 0.5, 1.0, 0.95]).repeat(batch // 4)
    rows[:, sampling.TOP_K] = torch.tensor([25, 1, 50, size]).repeat(batch // 4)
    rows[:, sampling.TOO_OFTEN] = torch.tensor([1.0, 2.5]).repeat(batch // 2)
    rows[:, sampling.EXCLUDED] = torch.tensor([size, size - 3, size, size]).repeat(batch // 4)
    likely = logits.topk(4).indices.double()
    rows[:, sampling.RECENT :] = torch.cat([likely, likely[:, :2], likely[:, :1], rows[:, -3:]], dim=1)
    logits[5, 3], logits[6, 4] = float("nan"), float("inf")
    logits, rows = logits.to(device), rows.to(device)
    return torch.equal(choose(logits, rows), sampling.choose(logits, rows))


@triton.jit(do_not_specialize=["columns"])
def _choose(logits, stride, rows, columns, out, size, BLOCK: tl.constexpr):
    """One row a program. What is computed is written at `sampling.ras_distribution`; all of it is in float64."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    given = rows + row * columns
    uniform = tl.load(given)
    top_p = tl.load(given + 1)
    top_k = tl.load(given + 2)
    too_often = tl.load(given + 3)
    excluded = tl.load(given + 4)

    x = tl.load(logits + row * stride + ids, mask=ids < size, other=0.0)
    broken = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32)) > 0
    x = tl.where((ids < size) & (ids < excluded), tl.where(broken, 0.0, x), float("-inf")).to(tl.float64)
    p = tl.exp(x - tl.max(x))
    p *= 1 / tl.sum(p)

    # The nucleus's least likely member is the smallest value with fewer than top_k values above it that sum to less
    # than top_p. Floats that are not negative are ordered as their bits are, so it is searched for bit by bit.
    bits = p.to(tl.int64, bitcast=True)
    highest = tl.max(bits)
    low = highest * 0
    least = highest
    while low < least:
        middle = (low + least) >> 1
        above = bits > middle
        if (tl.sum(tl.where(above, p, 0.0)) < top_p) & (tl.sum(above.to(tl.int32)) < top_k):
            least = middle
        else:
            low = middle + 1
    above = bits > least
    equal = bits == least
    value = tl.max(tl.where(equal, p, 0.0))
    room = top_k - tl.sum(above.to(tl.int32))
    wanted = (top_p - tl.sum(tl.where(above, p, 0.0))) / value  # of those that are equal, the first come in
    place = tl.cumsum(equal.to(tl.int32)) - 1
    n = tl.where(above | (equal & (place < room) & (place < wanted)), p, 0.0)
    n *= 1 / tl.sum(n)

    occurrences = tl.zeros([BLOCK], tl.int32)
    column = 5
    while column < columns:
        occurrences += (ids == tl.load(given + column).to(tl.int32)).to(tl.int32)
        column += 1
    top = tl.argmax(p, 0)
    rest = tl.where(ids == top, tl.sum(tl.where(ids == top, 0.0, p)), 1 - p)
    repeats = (occurrences >= too_often) & (rest > 0)
    moved = tl.where(repeats, n / tl.where(repeats, rest, 1.0), 0.0)
    others = tl.maximum(tl.sum(moved) - moved, 0.0)
    probabilities = tl.where(repeats, 0.0, n) + p * others

    cumulative = tl.cumsum(probabilities)
    reached = (cumulative > uniform * tl.max(cumulative)) & (probabilities > 0)
    chosen = tl.where(broken, size, tl.min(tl.where(reached, ids, size)))
    tl.store(out + row * (size + 1) + ids, tl.where(ids == chosen, 0.0, float("-inf")), mask=ids <= size)
