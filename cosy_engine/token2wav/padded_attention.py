"""Attention to a `PaddedPast` as one kernel that reads only the positions that are there, not the room for more.

Under a mask the room costs as much as a past. Here each row's loop ends where its past ends, though the shapes stay
those of a captured graph. With few rows the past is split among several programs, whose parts a second kernel joins.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosy_engine.modules.attention import PaddedPast

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: queries and keys of a block, programs that share a past, and the compiler's options."""

    queries: int = 64
    keys: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 2


@triton.jit
def _see(q, k, v, visible, best, total, acc, scale, PRECISION: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
    now = tl.maximum(best, tl.max(scores, 1))
    finite = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - finite[:, None])
    fade = tl.exp2(best - finite)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return now, total, acc


@triton.jit(do_not_specialize=["new", "chunk", "splits"])
def _attend(
    query, key, value, keys, values, lengths, counts, out, part, best_part, total_part,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, past_b, past_h, o_b, o_t,
    new, capacity, chunk, heads, splits, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, row_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (row_head // heads).to(tl.int64), (row_head % heads).to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, D)
    there = (i < new)[:, None]
    q = tl.load(query + row * q_b + head * q_h + i[:, None] * q_t + d, mask=there, other=0.0)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)

    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    first = split * share
    end = tl.minimum(first + share, length)
    past = row * past_b + head * past_h
    j = tl.arange(0, KEYS)
    for start in range(first, end, KEYS):
        n = start + j
        inside = (n < end)[:, None]
        k = tl.load(keys + past + n[:, None] * D + d, mask=inside, other=0.0)
        v = tl.load(values + past + n[:, None] * D + d, mask=inside, other=0.0)
        best, total, acc = _see(q, k, v, (n < end)[None, :], best, total, acc, scale, PRECISION)

    key_row, value_row = key + row * k_b + head * k_h, value + row * v_b + head * v_h
    if split == splits - 1:  # the new positions, and those of this block into the buffer
        count = tl.load(counts + row).to(tl.int32)
        sees = tl.minimum((i // chunk + 1) * chunk, count)
        last = tl.minimum(((block * QUERIES + QUERIES - 1) // chunk + 1) * chunk, count)
        for start in range(0, last, KEYS):
            n = start + j
            inside = (n < count)[:, None]
            k = tl.load(key_row + n[:, None] * k_t + d, mask=inside, other=0.0)
            v = tl.load(value_row + n[:, None] * v_t + d, mask=inside, other=0.0)
            best, total, acc = _see(q, k, v, n[None, :] < sees[:, None], best, total, acc, scale, PRECISION)
        room = past + (capacity + i[:, None]) * D + d
        tl.store(keys + room, tl.load(key_row + i[:, None] * k_t + d, mask=there), mask=there)
        tl.store(values + room, tl.load(value_row + i[:, None] * v_t + d, mask=there), mask=there)

    if SPLIT:
        place = (split * tl.num_programs(1) + row_head) * new + i
        tl.store(part + place[:, None] * D + d, acc, mask=there)
        tl.store(best_part + place, best, mask=i < new)
        tl.store(total_part + place, total, mask=i < new)
    else:
        attended = acc / total[:, None]
        tl.store(out + row * o_b + head * D + i[:, None] * o_t + d, attended.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["new", "splits", "size"])
def _join(part, best_part, total_part, out, o_b, o_t, new, heads, size, splits, D: tl.constexpr, QUERIES: tl.constexpr):
    block, row_head = tl.program_id(0), tl.program_id(1)
    row, head = (row_head // heads).to(tl.int64), (row_head % heads).to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, D)
    there = i < new
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    for split in range(splits):
        place = (split * size + row_head) * new + i
        own = tl.load(best_part + place, mask=there, other=0.0)
        now = tl.maximum(best, own)
        finite = tl.where(now == float("-inf"), 0.0, now)
        before, after = tl.exp2(best - finite), tl.exp2(own - finite)
        total = total * before + tl.load(total_part + place, mask=there, other=1.0) * after
        own_acc = tl.load(part + place[:, None] * D + d, mask=there[:, None], other=0.0)
        acc = acc * before[:, None] + own_acc * after[:, None]
        best = now
    attended = acc / total[:, None]
    where = out + row * o_b + head * D + i[:, None] * o_t + d
    tl.store(where, attended.to(out.dtype.element_ty), mask=there[:, None])


@dataclass
class TightPast(PaddedPast):
    """A `PaddedPast` whose room costs nothing."""

    def mask(self, new: int) -> None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, tiles: Tiles | None = None
    ) -> Tensor:
        """As `PaddedPast.attend`; d is a power of two from 16 on. Heads of the result are merged without a copy."""
        batch, heads, new, size = query.shape
        tiles = tiles or tiles_for(query.dtype, batch * heads, new, self.capacity, _programs(query.device))
        splits = tiles.splits
        out = query.new_empty(batch, new, heads, size)
        shape = (splits, batch * heads, new) if splits > 1 else (0,)
        part = torch.empty((*shape, size), dtype=torch.float32, device=query.device)
        best, total = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
        blocks = -(-new // tiles.queries)
        keys, values = self.keys, self.values
        _attend[(blocks, batch * heads, splits)](
            query, key, value, keys, values, self.lengths, self.counts, out, part, best, total,
            query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2), keys.stride(0), keys.stride(1),
            out.stride(0), out.stride(1), new, self.capacity, self.chunk, heads, splits, _LOG2_E * size**-0.5,
            D=size, QUERIES=tiles.queries, KEYS=tiles.keys, SPLIT=splits > 1,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            _join[(-(-new // 16), batch * heads)](
                part, best, total, out, out.stride(0), out.stride(1), new, heads, batch * heads, splits,
                D=size, QUERIES=16,
            )  # fmt: skip
        return out.transpose(1, 2)


def tiles_for(dtype: torch.dtype, rows_heads: int, new: int, capacity: int, programs: int) -> Tiles:
    """As many programs as the GPU runs at once, but none with less than 256 of the longest past."""
    side = 32 if dtype == torch.float32 else 64  # what the registers hold
    blocks = -(-new // side) * rows_heads
    return Tiles(side, side, splits=max(1, min(programs // blocks, capacity // 256, 16)))


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def agrees(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether this gives what PyTorch's attention gives for some shapes, up to rounding.

    The room is filled with what is not a number: nothing there may be read.
    """
    tiles = tiles_for(dtype, 1, 1, 0, 1)
    cuts = (replace(tiles, splits=splits) for splits in (1, 3))  # which are compiled apart
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return all(_agrees(device, dtype, heads, head_dim, new, cut) for cut in cuts for new in (50, 100))


def _agrees(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, new: int, tiles: Tiles) -> bool:
    generator = torch.Generator().manual_seed(new)
    lengths, counts = torch.tensor([0, 1, 150, 192]), torch.tensor([new, 5, new - 1, new])
    rows, capacity = len(lengths), 192

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    news = [draw(rows, new, heads * head_dim).unflatten(2, (heads, head_dim)).transpose(1, 2) for _ in range(3)]
    past = draw(2, rows, heads, capacity + new + 7, head_dim)
    room = torch.arange(past.shape[3]) >= lengths[:, None]
    places = lengths.to(device), counts.to(device), capacity, 50
    exact = PaddedPast(*past.masked_fill(room[:, None, :, None].to(device), 0).double(), *places)
    tight = TightPast(*past.masked_fill(room[:, None, :, None].to(device), torch.nan), *places)
    expected = exact.attend(*(tensor.double() for tensor in news), exact.mask(new))
    got = tight.attend(*news, tiles=tiles)
    written = all(
        torch.equal(buffer[:, :, capacity : capacity + new], tensor)
        for buffer, tensor in zip((tight.keys, tight.values), news[1:], strict=True)
    )
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    return written and torch.allclose(got.double(), expected, atol=tolerance, rtol=tolerance)
