from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from cosy_engine.ui.common import message
from cosy_engine.ui.run import or_nothing


async def test_items_pass_and_silence_is_filled() -> None:
    async def steps() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.2)
        yield 2

    got = [item async for item in or_nothing(steps(), seconds=0.05)]
    assert got[0] == 1 and got[-1] == 2
    assert len(got) > 3 and set(got[1:-1]) == {None}


async def test_leaving_stops_the_work() -> None:
    stopped = asyncio.Event()

    async def steps() -> AsyncIterator[int]:
        try:
            while True:
                await asyncio.sleep(3600)
                yield 0
        finally:
            stopped.set()

    async with aclosing(or_nothing(steps(), seconds=0.01)) as items:
        async for _ in items:
            break
    assert stopped.is_set()


def test_what_people_write_is_shown_and_never_run() -> None:
    shown = message("<script>alert(1)</script>", error=True)
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
