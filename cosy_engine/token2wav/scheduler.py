"""Who is served next: one thread that makes the chunks of all streams."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from cosy_engine.cores import use_cores
from cosy_engine.errors import BackendFailedError, EngineStoppedError
from cosy_engine.token2wav.work import Making, Work

_BATCHES_GIVEN = 2
_SWITCH_INTERVAL = 0.0005  # seconds
_FIRST_SOUND = 0.4  # seconds that who has heard nothing yet may wait
_HURRY = 0.25  # seconds before its moment from which on work comes first
_FAR_MORE = 8  # jobs
_T = TypeVar("_T")
Urgency = float  # the moment that work should be done by, as `time.perf_counter` tells


def first_sound(submitted: float) -> Urgency:
    """Of work that a listener waits for who has heard nothing yet."""
    return submitted + _FIRST_SOUND


def runs_dry(moment: float) -> Urgency:
    """Of work for a listener whose sound ends at this moment."""
    return moment


class _Job:
    """A generator that is being driven, and who waits for what it makes."""

    def __init__(self, making: Making[Any], urgency: Urgency) -> None:
        self.making, self.urgency = making, urgency
        self.future: Future[Any] = Future()
        self.work: Work | None = None


class Scheduler:
    """Drives the generators of many streams on one thread, most urgent first.

    Before each piece of work it looks again at who waits, so a new request joins between two Euler steps of the
    others. Work with the same key is done in one batch. While nobody is in a hurry, work of which there is much goes
    first, and the rest gathers meanwhile.

    Args:
        batch: pieces of work in one batch; with 1, what a request hears does not depend, to the last bit, on others.
        device: where the work is done; a GPU is given only two batches at a time, or those who join would wait for
            all that it had been given before. With a GPU the process's threads hand Python's lock on more often.
        threads: that an operation may use on a CPU; None: as many as torch likes.
    """

    def __init__(self, batch: int, device: torch.device, threads: int | None = None) -> None:
        self.batch = batch
        self._threads = threads
        self._device = device
        self._given: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None
        self._jobs: list[_Job] = []
        self._stopping = False
        self._changed = threading.Condition()  # guards what is above
        self._thread = threading.Thread(target=self._work, name="token2wav", daemon=True)
        self._thread.start()

    def submit(self, making: Making[_T], urgency: Urgency) -> Future[_T]:
        """What the generator returns, as soon as its work is done; cancelling drops it after the current piece.

        Raises:
            EngineStoppedError: here or from the future, when the scheduler has been closed.
        """
        job = _Job(making, urgency)
        with self._changed:
            if self._stopping:
                raise _stopped()
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    async def run(self, making: Making[_T], urgency: Urgency) -> _T:
        """The same for a coroutine; cancelling it cancels the work."""
        return await asyncio.wrap_future(self.submit(making, urgency))

    def close(self) -> None:
        """Stop after the current piece of work; what waits ends with EngineStoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        use_cores(self._threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
            # torch lets go of Python's lock in each operation, and a busy thread would keep it for ten times as long.
            sys.setswitchinterval(_SWITCH_INTERVAL)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._jobs)
                if self._stopping:
                    break
            self._take_turn()  # what it knows of a job does not stay
        for job in list(self._jobs):
            self._end(job, error=_stopped())

    def _take_turn(self) -> None:
        """Begin what may begin, and do a piece of what can be done. While a job waits for what others have, no less
        urgent one begins: those that have begun end at some time, and then it gets what there is."""
        with self._changed:
            urgent = sorted(self._jobs, key=lambda job: job.urgency)
        ready: list[_Job] = []
        waiting: list[_Job] = []
        for place, job in enumerate(urgent):
            if job.future.cancelled():
                self._end(job)
            elif job.work is None and place < self.batch and not waiting:
                self._go_on(job)
            if job.work is not None:
                self._sort(job, ready, waiting)
        self._run(ready or waiting[:1])

    def _sort(self, job: _Job, ready: list[_Job], waiting: list[_Job]) -> None:
        try:
            (waiting if job.work.waits else ready).append(job)
        except Exception as error:
            self._end(job, error=_told(error))

    def _run(self, jobs: Sequence[_Job]) -> None:
        """One batch of the most urgent work and of what goes with it."""
        if not jobs:
            return
        batch = jobs[: self.batch]
        if len(batch) > 1:
            key = self._most_worthwhile(jobs)
            batch = [job for job in jobs if job.work.key == key][: self.batch]
        try:
            batch[0].work.run([job.work for job in batch])
        except Exception as error:
            for job in batch:
                self._end(job, error=_told(error))
            return
        for job in batch:
            if job.work.done:
                self._go_on(job)
        if self._given is not None:
            self._given.append(torch.cuda.Event(blocking=True))
            self._given[-1].record()
            if len(self._given) > _BATCHES_GIVEN:
                self._given.popleft().synchronize()

    def _most_worthwhile(self, jobs: Sequence[_Job]) -> Hashable:
        """The key of the most urgent work, or of far more if that is in no hurry: it takes a GPU not much longer."""
        urgent = jobs[0].work.key
        if jobs[0].urgency - time.perf_counter() < _HURRY:
            return urgent
        counts = Counter(job.work.key for job in jobs)
        most = max(counts, key=counts.__getitem__)
        return most if min(counts[most], self.batch) >= counts[urgent] + _FAR_MORE else urgent

    def _go_on(self, job: _Job) -> None:
        try:
            job.work = next(job.making)
        except StopIteration as end:
            self._end(job, result=end.value)
        except Exception as error:
            self._end(job, error=_told(error))

    def _end(self, job: _Job, *, result: Any = None, error: Exception | None = None) -> None:
        with self._changed:
            self._jobs.remove(job)
        job.work = None
        job.making.close()
        if not job.future.set_running_or_notify_cancel():
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)


def _told(error: Exception) -> Exception:
    """What the request hears; the memory that the failed work had is free."""
    traceback.clear_frames(error.__traceback__)
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return BackendFailedError(
        "The GPU had no memory left for this request; try again in a moment. If it happens often, lower "
        "COSY_CONCURRENCY or COSY_STREAM_MEMORY_MB."
    )


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("The engine is shutting down; try again in a moment.")
