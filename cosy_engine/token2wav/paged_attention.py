"""Attention to a `PagedPast` as one kernel that reads each stream's own pages where they lie, and writes the new ones.

Otherwise the pages would have to be copied side by side, and room for more would cost as much as a past. Here each
row's loop ends where its past ends, though the shapes stay those of a captured graph. With few rows a long past is
split among several programs, whose parts a second kernel joins.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosy_engine.modules.attention import PagedPast

_LOG2_E = 1.4426950408889634
_SHARE = tl.constexpr(256)  # positions: a past is split only into parts of more than this


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


@triton.jit
def _splits(length, most):
    """Into how many parts a past of this length is split."""
    return tl.minimum(most, tl.maximum(1, tl.cdiv(length, _SHARE)))


@triton.jit(do_not_specialize=["new", "chunk", "splits", "width"])
def _attend(
    query, key, value, pages, table, steps, lengths, counts, out, part, best_part, total_part,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, page_stride, step_stride, kind_stride, row_stride, head_stride,
    o_b, o_t, new, width, chunk, heads, splits, scale,
    D: tl.constexpr, PAGE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
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
    splits = _splits(length, splits)
    if split >= splits:
        return
    share = tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    first = split * share
    end = tl.minimum(first + share, length)
    own_table = table + (row // 2) * width
    own_pages = (
        pages + tl.load(steps + row // 2).to(tl.int64) * step_stride + (row % 2) * row_stride + head * head_stride
    )
    j = tl.arange(0, KEYS)
    for start in range(first, end, KEYS):
        n = start + j
        inside = n < end
        page = tl.load(own_table + n // PAGE, mask=inside, other=0).to(tl.int64)
        place = own_pages + (page * page_stride + (n % PAGE) * D)[:, None] + d
        k = tl.load(place, mask=inside[:, None], other=0.0)
        v = tl.load(place + kind_stride, mask=inside[:, None], other=0.0)
        best, total, acc = _see(q, k, v, inside[None, :], best, total, acc, scale, PRECISION)

    key_row, value_row = key + row * k_b + head * k_h, value + row * v_b + head * v_h
    if split == splits - 1:  # the new positions, and those of this block into their pages
        count = tl.load(counts + row).to(tl.int32)
        sees = tl.minimum((i // chunk + 1) * chunk, count)
        last = tl.minimum(((block * QUERIES + QUERIES - 1) // chunk + 1) * chunk, count)
        for start in range(0, last, KEYS):
            n = start + j
            inside = (n < count)[:, None]
            k = tl.load(key_row + n[:, None] * k_t + d, mask=inside, other=0.0)
            v = tl.load(value_row + n[:, None] * v_t + d, mask=inside, other=0.0)
            best, total, acc = _see(q, k, v, n[None, :] < sees[:, None], best, total, acc, scale, PRECISION)
        kept = i < count
        page = tl.load(own_table + (length + i) // PAGE, mask=kept, other=0).to(tl.int64)
        place = own_pages + (page * page_stride + ((length + i) % PAGE) * D)[:, None] + d
        kept = kept[:, None]
        tl.store(place, tl.load(key_row + i[:, None] * k_t + d, mask=kept), mask=kept)
        tl.store(place + kind_stride, tl.load(value_row + i[:, None] * v_t + d, mask=kept), mask=kept)

    if SPLIT:
        place = (split * tl.num_programs(1) + row_head) * new + i
        tl.store(part + place[:, None] * D + d, acc, mask=there)
        tl.store(best_part + place, best, mask=i < new)
        tl.store(total_part + place, total, mask=i < new)
    else:
        attended = acc / total[:, None]
        tl.store(out + row * o_b + head * D + i[:, None] * o_t + d, attended.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["new", "splits", "size"])
def _join(
    part, best_part, total_part, lengths, out, o_b, o_t, new, heads, size, splits,
    D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    block, row_head = tl.program_id(0), tl.program_id(1)
    row, head = (row_head // heads).to(tl.int64), (row_head % heads).to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, D)
    there = i < new
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    for split in range(_splits(tl.load(lengths + row).to(tl.int32), splits)):
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
class KernelPast(PagedPast):
    """A `PagedPast` whose pages are read where they lie."""

    def mask(self, new: int) -> None:
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, tiles: Tiles | None = None
    ) -> Tensor:
        """As `PagedPast.attend`; d is a power of two from 16 on. Heads of the result are merged without a copy."""
        batch, heads, new, size = query.shape
        pages = self.pages
        room = self.table.shape[1] * pages.shape[5]
        tiles = tiles or tiles_for(query.dtype, batch * heads, new, room, _programs(query.device))
        splits = tiles.splits
        out = query.new_empty(batch, new, heads, size)
        shape = (splits, batch * heads, new) if splits > 1 else (0,)
        part = torch.empty((*shape, size), dtype=torch.float32, device=query.device)
        best, total = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
        _attend[(-(-new // tiles.queries), batch * heads, splits)](
            query, key, value, pages, self.table, self.steps, self.lengths, self.counts, out, part, best, total,
            query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2), *pages.stride()[:5],
            out.stride(0), out.stride(1), new, self.table.shape[1], self.chunk, heads, splits, _LOG2_E * size**-0.5,
            D=size, PAGE=pages.shape[5], QUERIES=tiles.queries, KEYS=tiles.keys, SPLIT=splits > 1,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            _join[(-(-new // 16), batch * heads)](
                part, best, total, self.lengths, out, out.stride(0), out.stride(1), new, heads, batch * heads, splits,
                D=size, QUERIES=16,
            )  # fmt: skip
        return out.transpose(1, 2)


def tiles_for(dtype: torch.dtype, rows_heads: int, new: int, room: int, programs: int) -> Tiles:
    """As many programs as the GPU runs at once, as far as the longest past is worth it."""
    tiles = Tiles(32, 32) if dtype == torch.float32 else Tiles(64, 32, stages=3)  # what the registers hold
    blocks = -(-new // tiles.queries) * rows_heads
    return replace(tiles, splits=max(1, min(programs // blocks, room // _SHARE.value, 16)))


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def agrees(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether this gives what PyTorch's attention gives for some shapes, up to rounding.

    All that is nobody's is filled with what is not a number: nothing there may be read.
    """
    tiles = tiles_for(dtype, 1, 1, 0, 1)
    cuts = (replace(tiles, splits=splits) for splits in (1, 3))  # which are compiled apart
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return all(_agrees(device, dtype, heads, head_dim, new, cut) for cut in cuts for new in (50, 100))


def _agrees(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, new: int, tiles: Tiles) -> bool:
    generator = torch.Generator().manual_seed(new)
    lengths, counts = (
        torch.tensor([0, 0, 1, 1, 150, 150, 600, 600]),
        torch.tensor([new, new, 5, 5, new - 1, new - 1, 1, 1]),
    )
    table = torch.randperm(4 * 45, generator=generator, dtype=torch.int32).view(4, 45) + 1
    steps = torch.tensor([1, 0, 1, 1], dtype=torch.int32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    news = [draw(8, new, heads * head_dim).unflatten(2, (heads, head_dim)).transpose(1, 2) for _ in range(3)]
    pages = draw(4 * 45 + 1, 2, 2, 2, heads, 16, head_dim)
    theirs = torch.zeros(len(pages), 2, 16, dtype=torch.bool)  # which positions have been written
    for own, step, length in zip(table, steps, lengths[::2], strict=True):
        theirs[own.long(), step] = torch.arange(45 * 16).view(45, 16) < length
    nobodys = ~theirs[:, :, None, None, None, :, None].to(device)
    places = table.to(device), steps.to(device), lengths.to(device), counts.to(device), 50
    exact = PagedPast(pages.masked_fill(nobodys, 0).double(), *places)
    tight = KernelPast(pages.masked_fill(nobodys, torch.nan), *places)
    expected = exact.attend(*(tensor.double() for tensor in news), exact.mask(new))
    got = tight.attend(*news, tiles=tiles)
    written = exact.pages.ne(0).any(dim=-1)[1:]  # but for the page of nothing
    same = torch.equal(tight.pages[1:][written].double(), exact.pages[1:][written])
    untouched = tight.pages[1:][~written].isnan().all()
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    return same and bool(untouched) and torch.allclose(got.double(), expected, atol=tolerance, rtol=tolerance)
