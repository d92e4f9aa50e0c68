"""Memory for what the estimator remembers of streams: pages that are handed out, shared, and come back.

A page has the keys and values of some positions in a row, of all attention layers, of both guidance halves and of all
Euler steps. So a stream grows without copying, leaves no more than a part of a page unused, shares its voice's pages
with the other streams of that voice, and all of it is one tensor that a captured graph can point to.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 16  # positions, 0.32 s
_NOTHING = 0  # a page that nobody owns: what is filled up is written there


class PagePool:
    """All pages there are.

    To be used by one thread; only the end of a stream may come on any.

    Args:
        shape: of one position: `(steps, layers, heads, d)`.
        memory: bytes that all pages may take; there is always room for the page of nothing and one more.

    Attributes:
        pages: `[pages, steps, layers, 2, rows, heads, PAGE, d]`: keys and values, of the two rows of the guidance.
        reclaimers: functions that let somebody's pages go who can do without, and say whether there was such a one.
            They are held weakly, methods too.
    """

    def __init__(self, shape: tuple[int, int, int, int], memory: int, device: torch.device, dtype: torch.dtype) -> None:
        steps, layers, heads, size = shape
        page = (steps, layers, 2, 2, heads, PAGE, size)
        self.page_bytes = torch.empty(page, dtype=dtype, device="meta").nbytes
        count = max(2, memory // self.page_bytes)
        self.pages = torch.zeros(count, *page, dtype=dtype, device=device)
        self.reclaimers: list[weakref.ref[Callable[[], bool]]] = []
        self._users = [1] + (count - 1) * [0]
        self._free = list(range(count - 1, _NOTHING, -1))
        self._returned: deque[list[int]] = deque()

    @property
    def most(self) -> int:
        """Pages that one can have."""
        return len(self._users) - 1

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        while self._returned:
            self.give_back(self._returned.popleft())
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, which others may have to let go of; None: there are not that many."""
        if count > self.most:
            return None
        while self.free < count:
            if not any(reclaim() for reclaim in self._reclaiming()):
                return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """They have one more user, who gives them back, too."""
        for page in pages:
            self._users[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """A user of these pages is gone."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def give_back_from_any_thread(self, pages: list[int]) -> None:
        """The same, done as soon as the pool is used."""
        self._returned.append(pages)

    def alone(self, page: int) -> bool:
        """Whether a page has one user only."""
        return self._users[page] == 1

    def _reclaiming(self) -> list[Callable[[], bool]]:
        self.reclaimers = [found for found in self.reclaimers if found() is not None]
        return [reclaim for found in self.reclaimers if (reclaim := found()) is not None]


class PagedStream:
    """What the estimator remembers of one stream at all Euler steps.

    Attributes:
        pages: in the order of the positions.
        length: positions at every step; while a chunk is made, those before it.
        tails: last inputs of the convolutions, `[rows, tail_size]` for each step.
    """

    def __init__(self, pool: PagePool, pages: list[int], length: int, tails: list[Tensor], shared: int = 0) -> None:
        self.pool, self.pages, self.length, self.tails = pool, pages, length, tails
        self._shared = shared  # leading pages that are read only
        weakref.finalize(self, pool.give_back_from_any_thread, pages).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of its own pages and of the tails."""
        own = (len(self.pages) - self._shared) * self.pool.page_bytes
        return own + sum(tail.nbytes for tail in self.tails)

    def reserve(self, count: int) -> bool:
        """Make room for so many more positions; False: there are not enough pages."""
        copied, needed = len(self.pages) == self._shared and self.length % PAGE > 0, _pages_for(self.length + count)
        taken = self.pool.take(needed - len(self.pages) + copied) if needed <= self.pool.most else None
        if taken is None:
            return False
        if copied:
            last, copy = self.pages.pop(), taken.pop()
            self.pool.pages[copy] = self.pool.pages[last]
            self.pool.give_back([last])
            self.pages.append(copy)
            self._shared -= 1
        self.pages.extend(taken)
        return True

    def separate_tails(self) -> None:
        """Keep them apart from those of the streams that were in a batch with this one."""
        self.tails = [tail.clone() for tail in self.tails]

    def fork(self) -> PagedStream:
        """A copy that can go on independently; the pages are shared."""
        used = self.pages[: _pages_for(self.length)]
        self.pool.share(used)
        return PagedStream(self.pool, used, self.length, list(self.tails), shared=len(used))

    def to(self, device: torch.device) -> PagedStream | StoredStream:
        """Itself where the pages are; elsewhere a copy outside of the pool."""
        if device == self.pool.pages.device:
            return self
        used = self.pages[: _pages_for(self.length)]
        stored = self.pool.pages.new_empty((len(used), *self.pool.pages.shape[1:]), device=device)
        for number, page in enumerate(used):  # one by one, as there may be no room for a copy here
            stored[number] = self.pool.pages[page]
        return StoredStream(self.pool, stored, self.length, [tail.to(device) for tail in self.tails])


class StoredStream:
    """A `PagedStream` in other memory."""

    def __init__(self, pool: PagePool, pages: Tensor, length: int, tails: list[Tensor]) -> None:
        self._pool, self._pages, self._length, self._tails = pool, pages, length, tails

    @property
    def nbytes(self) -> int:
        return self._pages.nbytes + sum(tail.nbytes for tail in self._tails)

    def to(self, device: torch.device) -> PagedStream | StoredStream:
        """Back into the pool, if it has room."""
        taken = None if device != self._pool.pages.device else self._pool.take(len(self._pages))
        if taken is None:
            return self
        stream = PagedStream(self._pool, taken, self._length, [])  # which gives the pages back if a copy fails
        for page, stored in zip(taken, self._pages, strict=True):
            self._pool.pages[page] = stored
        stream.tails = [tail.to(device) for tail in self._tails]
        return stream


def _pages_for(positions: int) -> int:
    return -(-positions // PAGE)
