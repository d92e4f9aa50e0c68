"""`sampling.choose` and `vllm_slots.choose` as one Triton kernel each, for vLLM on an NVIDIA GPU; nothing else here
needs Triton.

The torch form is some eighty operations a step, more than vLLM launches for the model, which is in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosy_engine.speech_lm import sampling
from cosy_engine.speech_lm.vllm_slots import Batch

_WARPS = 16  # a row; its values fill their registers


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """As `sampling.choose`, on one GPU; logits may be a part of wider rows, as those of a padded head are."""
    batch, size = logits.shape
    chosen = torch.empty(batch, size + 1, dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(size + 1)
    _choose[(batch,)](logits, logits.stride(0), rows, rows.shape[1], chosen, size, BLOCK=block, num_warps=_WARPS)
    return chosen


def choose_in_slots(batch: Batch, table: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """As `vllm_slots.choose`."""
    rows, size = batch.logits.shape
    chosen = torch.empty(rows, dtype=torch.int64, device=table.device)
    sampled = torch.empty(rows, dtype=torch.int32, device=table.device)
    _choose_in_slots[(rows,)](
        batch.logits,
        batch.logits.stride(0),
        batch.slot,
        batch.token,
        batch.positions,
        batch.ids,
        table,
        table.shape[1],
        chosen,
        sampled,
        codes,
        size,
        BLOCK=triton.next_power_of_2(size + 1),
        num_warps=_WARPS,
    )
    return chosen, sampled


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
    """One row a program."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    given = rows + row * columns
    uniform = tl.load(given)
    top_p = tl.load(given + 1)
    top_k = tl.load(given + 2)
    too_often = tl.load(given + 3)
    excluded = tl.load(given + 4)
    x = tl.load(logits + row * stride + ids, mask=ids < size, other=0.0).to(tl.float32)
    chosen = _draw(x, size, uniform, top_p, top_k, too_often, excluded, given + 5, columns - 5, -1, uniform, BLOCK)
    tl.store(out + row * (size + 1) + ids, tl.where(ids == chosen, 0.0, float("-inf")), mask=ids <= size)


@triton.jit
def _choose_in_slots(
    logits, stride, slots, tokens, positions, token_ids, table, columns, out, sampled, codes, size, BLOCK: tl.constexpr
):
    """One row a program; the table's columns are those of `vllm_slots`."""
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    given = table + tl.load(slots + row).to(tl.int64) * columns
    top_p = tl.load(given)
    top_k = tl.load(given + 1)
    too_often = tl.load(given + 2)
    fewest = tl.load(given + 3).to(tl.int32)
    prompt = tl.load(given + 4).to(tl.int32)
    complete_from = tl.load(given + 5).to(tl.int32)
    earlier = tl.load(given + 6).to(tl.int32)
    window = tl.load(given + 7).to(tl.int32)
    count = tl.load(given + 8).to(tl.int32)
    ring = given + 9
    token = tl.load(tokens + row)
    known = tl.load(positions + token).to(tl.int32) + 1
    step = known - prompt
    complete = known >= complete_from
    fresh = complete & (step > 0)  # the last id was drawn here, in the step before
    place = tl.where(fresh, (earlier + tl.maximum(step, 1) - 1) % window, -1)
    last = tl.load(token_ids + token).to(tl.float64)
    uniform = tl.load(ring + window + tl.minimum(tl.maximum(step, 0), count - 1))
    excluded = tl.where(step < fewest, codes, size)
    x = tl.load(logits + row * stride + ids, mask=ids < size, other=0.0).to(tl.float32)
    chosen = _draw(x, size, uniform, top_p, top_k, too_often, excluded, ring, window, place, last, BLOCK)
    tl.store(ring + place, last, mask=fresh)
    tl.store(out + row, chosen.to(tl.int64))
    tl.store(sampled + row, complete.to(tl.int32))


@triton.jit
def _draw(x, size, uniform, top_p, top_k, too_often, excluded, ring, window, late, last, BLOCK: tl.constexpr):
    """The id for scores x. What is computed is written at `sampling.ras_distribution`; all of it is in float64.

    The recent ids are those of the ring, but for `last`, which is not there yet, in place `late`, if not negative.
    """
    ids = tl.arange(0, BLOCK)
    broken = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32)) > 0
    x = tl.where((ids < size) & (ids < excluded), tl.where(broken, 0.0, x), float("-inf")).to(tl.float64)
    p = tl.exp(x - tl.max(x))
    p *= 1 / tl.sum(p)

    # The nucleus's least likely member is the smallest value with fewer than top_k values above it that sum to less
    # than top_p. Floats that are not negative are ordered as their bits are. Few values are as large, as a rule,
    # so it is searched for from the top, value by value, and bit by bit only if it is far down.
    bits = p.to(tl.int64, bitcast=True)
    highest = tl.max(bits)
    low = highest * 0
    least = highest
    tries = 0
    while (low < least) & (tries < 32):
        below = tl.max(tl.where(bits < least, bits, 0))
        above = bits > below
        if (tl.sum(tl.where(above, p, 0.0)) < top_p) & (tl.sum(above.to(tl.int32)) < top_k):
            least = below
        else:
            low = least
        tries += 1
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
    column = 0
    while column < window:
        recent = tl.where(column == late, last, tl.load(ring + column))
        occurrences += (ids == recent.to(tl.int32)).to(tl.int32)
        column += 1
    top = tl.argmax(p, 0)
    rest = tl.where(ids == top, tl.sum(tl.where(ids == top, 0.0, p)), 1 - p)
    repeats = (occurrences >= too_often) & (rest > 0)
    moved = tl.where(repeats, n / tl.where(repeats, rest, 1.0), 0.0)
    others = tl.maximum(tl.sum(moved) - moved, 0.0)
    probabilities = tl.where(repeats, 0.0, n) + p * others

    cumulative = tl.cumsum(probabilities)
    reached = (cumulative > uniform * tl.max(cumulative)) & (probabilities > 0)
    return tl.where(broken, size, tl.min(tl.where(reached, ids, size)))
