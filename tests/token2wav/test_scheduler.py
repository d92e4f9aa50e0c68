from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.errors import BackendFailedError, EngineStoppedError
from cosy_engine.token2wav.scheduler import Scheduler, Urgency, first_sound, runs_dry
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import Encode, EulerSteps, Making, Vocode
from tests.token2wav.test_session import random_prompt, random_tokens, run

TOLERANCE = 1e-4
CPU = torch.device("cpu")


class Gate:
    """Holds the scheduler's thread until it is opened, so that a test can fill the queue."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._opened, entered = threading.Event(), threading.Event()

        def wait() -> Making[None]:
            entered.set()
            self._opened.wait(timeout=10)
            yield from ()

        scheduler.submit(wait(), first_sound(0))
        assert entered.wait(timeout=10)

    def open(self) -> None:
        self._opened.set()


@dataclass
class Steps:
    """Work of a few steps that writes down who was served together."""

    name: str
    left: int
    log: list[list[str]]
    key: Hashable = "same"
    done: bool = field(default=False)
    waits: bool = False

    @classmethod
    def run(cls, batch: Sequence[Steps]) -> None:
        batch[0].log.append([work.name for work in batch])
        for work in batch:
            if work.name == "broken":
                raise ValueError("no")
            work.left -= 1
            work.done = work.left == 0


def making(work: Steps) -> Making[str]:
    yield work
    return work.name


@pytest.fixture(params=[1, 2])
def scheduler(request: pytest.FixtureRequest):
    scheduler = Scheduler(request.param, CPU)
    yield scheduler
    scheduler.close()


def submit(scheduler: Scheduler, log: list[list[str]], *jobs: tuple[str, int, Urgency]) -> list[Future]:
    gate = Gate(scheduler)
    futures = [scheduler.submit(making(Steps(name, left, log)), urgency) for name, left, urgency in jobs]
    gate.open()
    return futures


def test_whoever_has_the_least_time_left_goes_first() -> None:
    log: list[list[str]] = []
    scheduler = Scheduler(1, CPU)
    jobs = [
        ("late", 1, runs_dry(9)),
        ("soon", 1, runs_dry(2)),
        ("new", 1, first_sound(5)),
        ("older", 1, first_sound(4)),
    ]
    for future in submit(scheduler, log, *jobs):
        future.result(timeout=10)
    scheduler.close()
    assert [name for (name,) in log] == ["soon", "older", "new", "late"]


@pytest.mark.parametrize(
    "left, many, first",
    [(100.0, 9, "many"), (100.0, 8, "one"), (0.0, 9, "one")],
    ids=["no hurry", "hardly more", "hurry"],
)
def test_much_work_goes_before_more_urgent_work_that_is_in_no_hurry(left: float, many: int, first: str) -> None:
    log: list[list[str]] = []
    scheduler, now = Scheduler(16, CPU), time.perf_counter()
    gate = Gate(scheduler)
    futures = [scheduler.submit(making(Steps("one", 1, log, key="alone")), runs_dry(now + left))]
    futures += [scheduler.submit(making(Steps("many", 2, log)), runs_dry(now + left + 1)) for _ in range(many)]
    gate.open()
    for future in futures:
        future.result(timeout=10)
    scheduler.close()
    assert log[0][0] == first
    assert sorted(map(len, log)) == [1, many, many]


def test_a_new_request_joins_between_two_steps_of_another() -> None:
    log: list[list[str]] = []
    scheduler = Scheduler(2, CPU)

    class Joined(Steps):
        @classmethod
        def run(cls, batch: Sequence[Steps]) -> None:
            if not log:
                joined.append(scheduler.submit(making(Steps("new", 2, log)), first_sound(1)))
            Steps.run(batch)

    joined: list[Future] = []
    scheduler.submit(making(Joined("old", 3, log)), first_sound(0)).result(timeout=10)
    joined[0].result(timeout=10)
    scheduler.close()
    assert log == [["old"], ["old", "new"], ["old", "new"]]


def test_only_work_with_one_key_shares_a_batch() -> None:
    log: list[list[str]] = []
    scheduler = Scheduler(3, CPU)
    gate = Gate(scheduler)
    works = [Steps("a", 1, log, "x"), Steps("b", 1, log, "y"), Steps("c", 1, log, "x")]
    futures = [scheduler.submit(making(work), first_sound(number)) for number, work in enumerate(works, 1)]
    gate.open()
    assert [future.result(timeout=10) for future in futures] == ["a", "b", "c"]
    scheduler.close()
    assert log == [["a", "c"], ["b"]]


def test_an_error_reaches_its_request_and_the_next_one_is_served(scheduler: Scheduler) -> None:
    (broken,) = submit(scheduler, [], ("broken", 1, first_sound(1)))
    with pytest.raises(ValueError, match="no"):
        broken.result(timeout=10)
    assert submit(scheduler, [], ("next", 2, first_sound(1)))[0].result(timeout=10) == "next"


def test_memory_that_runs_out_is_told_as_such(scheduler: Scheduler) -> None:
    def greedy() -> Making[None]:
        yield from ()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(BackendFailedError, match="memory"):
        scheduler.submit(greedy(), first_sound(1)).result(timeout=10)


def test_what_is_cancelled_is_not_worked_on(scheduler: Scheduler) -> None:
    log: list[list[str]] = []
    gate = Gate(scheduler)
    cancelled = scheduler.submit(making(Steps("cancelled", 1, log)), first_sound(1))
    kept = scheduler.submit(making(Steps("kept", 1, log)), first_sound(2))
    cancelled.cancel()
    gate.open()
    assert kept.result(timeout=10) == "kept"
    assert log == [["kept"]]


def test_closing_ends_what_waits_and_refuses_more() -> None:
    scheduler = Scheduler(1, CPU)
    gate = Gate(scheduler)
    waiting = scheduler.submit(making(Steps("waiting", 1, [])), first_sound(1))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._stopping:
        pass
    gate.open()
    closing.join(timeout=10)
    with pytest.raises(EngineStoppedError):
        waiting.result(timeout=10)
    with pytest.raises(EngineStoppedError):
        scheduler.submit(making(Steps("late", 1, [])), first_sound(1))


@pytest.mark.parametrize("lengths", [(120, 120), (120, 75), (30, 180)])
@pytest.mark.parametrize("prompts", [(31, 31), (31, 77)])
def test_streams_in_one_batch_sound_as_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, model: CosyVoiceModel, prompts: tuple[int, int], lengths: tuple[int, int]
) -> None:
    token2wav, settings = Token2Wav(model.flow, model.hift), HopSettings()
    given = [
        (random_prompt(prompt, seed), random_tokens(count, seed), seed)
        for seed, (prompt, count) in enumerate(zip(prompts, lengths, strict=True))
    ]
    alone = [
        torch.cat(run(token2wav.session(prompt, settings, stream=True, seed=seed), tokens))
        for prompt, tokens, seed in given
    ]
    shared: set[type] = set()
    for kind in (Encode, EulerSteps, Vocode):
        run_batch = kind.run

        def counting(cls: type, batch: Sequence, run_batch=run_batch) -> None:
            if len(batch) > 1:
                shared.add(cls)
            run_batch(batch)

        monkeypatch.setattr(kind, "run", classmethod(counting))

    scheduler = Scheduler(2, CPU)
    sessions = [token2wav.session(prompt, settings, stream=True, seed=seed) for prompt, _, seed in given]
    sounds: list[list[torch.Tensor]] = [[], []]
    for session, (_, tokens, _) in zip(sessions, given, strict=True):
        session.push(tokens)
        session.finish()
    while any(not session.done for session in sessions):
        gate = Gate(scheduler)
        futures = [
            (sound, scheduler.submit(session.chunk(), first_sound(1)))
            for session, sound in zip(sessions, sounds, strict=True)
            if not session.done
        ]
        gate.open()
        for sound, future in futures:
            sound.append(future.result(timeout=60))
    scheduler.close()
    assert shared == {Encode, EulerSteps, Vocode}
    for sound, expected in zip(sounds, alone, strict=True):
        torch.testing.assert_close(torch.cat(sound), expected, atol=TOLERANCE, rtol=0)
