from __future__ import annotations

import asyncio
import threading

import pytest

from cosy_engine.admission import AdmissionQueue
from cosy_engine.errors import EngineStoppedError, QueueFullError


async def occupy(queue: AdmissionQueue, release: asyncio.Event, heard: list[int], order: list[str], name: str) -> None:
    async with queue.admit(heard.append):
        order.append(name)
        await release.wait()


async def start(*coroutines) -> list[asyncio.Task]:
    tasks = []
    for coroutine in coroutines:
        tasks.append(asyncio.create_task(coroutine))
        await asyncio.sleep(0)
    return tasks


async def test_turns_come_in_order_and_positions_are_told() -> None:
    queue, order = AdmissionQueue(concurrency=1, max_queue=5), []
    releases = {name: asyncio.Event() for name in "abc"}
    heard: dict[str, list[int]] = {name: [] for name in "abc"}
    tasks = await start(*(occupy(queue, releases[name], heard[name], order, name) for name in "abc"))
    assert (order, queue.active, queue.waiting) == (["a"], 1, 2)
    for name in "abc":
        releases[name].set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c"]
    assert heard == {"a": [0], "b": [1, 0], "c": [2, 1, 0]}
    assert (queue.active, queue.waiting) == (0, 0)


async def test_a_full_queue_refuses_and_says_when_to_retry() -> None:
    queue = AdmissionQueue(concurrency=1, max_queue=1)
    release = asyncio.Event()
    tasks = await start(*(occupy(queue, release, [], [], name) for name in "ab"))
    with pytest.raises(QueueFullError, match="try again") as refused:
        async with queue.admit():
            pass
    assert refused.value.retry_after > 0
    release.set()
    await asyncio.gather(*tasks)
    async with queue.admit():
        assert queue.active == 1


async def test_leaving_the_queue_gives_the_place_to_the_next() -> None:
    queue, order, heard = AdmissionQueue(concurrency=1, max_queue=5), [], []
    release = asyncio.Event()
    first, second, third = await start(
        occupy(queue, release, [], order, "a"),
        occupy(queue, release, [], order, "b"),
        occupy(queue, release, heard, order, "c"),
    )
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await asyncio.sleep(0)
    assert heard == [2, 1]
    release.set()
    await asyncio.gather(first, third)
    assert order == ["a", "c"]
    assert queue.active == 0


async def test_being_cancelled_just_as_the_turn_comes_passes_it_on() -> None:
    queue, order = AdmissionQueue(concurrency=1, max_queue=5), []
    releases = {name: asyncio.Event() for name in "abc"}
    first, second, third = await start(*(occupy(queue, releases[name], [], order, name) for name in "abc"))
    releases["a"].set()
    await first  # the turn is on its way to b
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    releases["c"].set()
    await asyncio.wait_for(third, 1)
    assert order[-1] == "c" and queue.active == 0


async def test_closing_ends_those_who_wait() -> None:
    queue = AdmissionQueue(concurrency=1, max_queue=5)
    release = asyncio.Event()
    first, second = await start(*(occupy(queue, release, [], [], name) for name in "ab"))
    queue.close()
    with pytest.raises(EngineStoppedError):
        await second
    with pytest.raises(EngineStoppedError):
        async with queue.admit():
            pass
    release.set()
    await first


async def test_a_broken_position_callback_takes_no_place() -> None:
    queue, release = AdmissionQueue(concurrency=1, max_queue=5), asyncio.Event()

    def broken(position: int) -> None:
        raise ValueError("cannot tell")

    [first] = await start(occupy(queue, release, [], [], "a"))
    with pytest.raises(ValueError, match="cannot tell"):
        async with queue.admit(broken):
            pass
    release.set()
    await first
    assert (queue.active, queue.waiting) == (0, 0)


async def test_an_event_loop_that_closed_while_waiting_is_passed_over() -> None:
    queue, release, order = AdmissionQueue(concurrency=1, max_queue=5), asyncio.Event(), []
    tasks = await start(*(occupy(queue, release, [], order, name) for name in "ab"))
    loop = asyncio.new_event_loop()
    lost = occupy(queue, release, [], order, "lost")

    def wait_and_close() -> None:
        loop.call_later(0.05, loop.stop)
        task = loop.create_task(lost)
        loop.run_forever()
        loop.close()
        task._log_destroy_pending = False

    await asyncio.to_thread(wait_and_close)
    tasks += await start(occupy(queue, release, [], order, "c"))
    assert queue.waiting == 3
    release.set()
    await asyncio.gather(*tasks)
    assert (order, queue.active, queue.waiting) == (["a", "b", "c"], 0, 0)


def test_callers_may_live_in_different_event_loops() -> None:
    queue, order = AdmissionQueue(concurrency=1, max_queue=5), []
    entered, leave = threading.Event(), threading.Event()

    async def hold() -> None:
        async with queue.admit():
            entered.set()
            await asyncio.to_thread(leave.wait)
            order.append("first")

    async def follow() -> None:
        async with queue.admit(lambda position: leave.set() if position == 1 else None):
            order.append("second")

    holder = threading.Thread(target=lambda: asyncio.run(hold()))
    holder.start()
    entered.wait(5)
    asyncio.run(asyncio.wait_for(follow(), 5))
    holder.join(5)
    assert order == ["first", "second"]
