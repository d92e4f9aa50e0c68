"""The bounded queue in front of the engine: who works now, who waits, and at which position."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cosy_engine.errors import EngineStoppedError, QueueFullError

PositionCallback = Callable[[int], None]


@dataclass(eq=False)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    on_position: PositionCallback | None
    position: int  # when it came

    def call(self, function: Callable[..., None], *arguments: object) -> bool:
        """Call it in the waiter's event loop; False when that is closed, so that nobody waits there any more."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True


class AdmissionQueue:
    """First come, first served. Callers may live in different event loops.

    Args:
        concurrency: how many are worked on at once.
        max_queue: how many may wait; the next one is refused.
    """

    def __init__(self, concurrency: int, max_queue: int) -> None:
        self.concurrency = concurrency
        self.max_queue = max_queue
        self._lock = threading.Lock()
        self._active = 0
        self._waiting: deque[_Waiter] = deque()
        self._seconds_per_request = 5.0
        self._closed = False

    @property
    def active(self) -> int:
        """Requests being worked on."""
        return self._active

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def took(self, seconds: float) -> None:
        """Tell how long a request took; the expected wait follows the mean."""
        self._seconds_per_request += 0.2 * (seconds - self._seconds_per_request)

    def expected_wait(self, position: int) -> float:
        """Seconds until the request at `position` (1 is next) begins."""
        return position * self._seconds_per_request / self.concurrency

    @asynccontextmanager
    async def admit(self, on_position: PositionCallback | None = None) -> AsyncIterator[None]:
        """Wait for a turn; `on_position` hears 1, 2, ... while waiting and 0 when the turn comes.

        Raises:
            QueueFullError: too many wait already.
            EngineStoppedError: the engine stopped while waiting.
        """
        waiter = self._enter(on_position)  # None: it is its turn at once
        if waiter is not None:
            try:
                if on_position is not None:
                    on_position(waiter.position)
                await waiter.future
            except BaseException:
                self._give_up(waiter)
                raise
        try:
            if on_position is not None:
                on_position(0)
            yield
        finally:
            self._leave()

    def close(self) -> None:
        """Refuse whoever waits and whoever comes."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for waiter in waiting:
            _resolve(waiter, EngineStoppedError("The engine is shutting down; try again in a moment."))

    def _enter(self, on_position: PositionCallback | None) -> _Waiter | None:
        with self._lock:
            if self._closed:
                raise EngineStoppedError("The engine is shutting down; try again in a moment.")
            if self._active < self.concurrency:
                self._active += 1
                return None
            if len(self._waiting) >= self.max_queue:
                retry_after = self.expected_wait(len(self._waiting))
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already; try again in about {retry_after:.0f} s.",
                    retry_after=retry_after,
                )
            loop = asyncio.get_running_loop()
            waiter = _Waiter(loop, loop.create_future(), on_position, len(self._waiting) + 1)
            self._waiting.append(waiter)
        return waiter

    def _leave(self) -> None:
        with self._lock:
            while self._waiting:
                if _resolve(self._waiting.popleft()):
                    break
            else:
                self._active -= 1
        self._report_positions()

    def _give_up(self, waiter: _Waiter) -> None:
        with self._lock:
            had_turn = waiter not in self._waiting
            if not had_turn:
                self._waiting.remove(waiter)
        if had_turn and not self._closed:
            self._leave()
        self._report_positions()

    def _report_positions(self) -> None:
        with self._lock:  # or a position could be heard after the turn
            for position, waiter in enumerate(self._waiting, start=1):
                if waiter.on_position is not None:
                    waiter.call(waiter.on_position, position)


def _resolve(waiter: _Waiter, error: Exception | None = None) -> bool:
    """End the wait; False when there is nobody left to tell."""

    def settle() -> None:
        if waiter.future.done():
            return
        if error is None:
            waiter.future.set_result(None)
        else:
            waiter.future.set_exception(error)

    return waiter.call(settle)
