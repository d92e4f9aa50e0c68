from __future__ import annotations

from cosy_engine.token2wav.memory import StreamMemory


class Stream:
    """Stands for a session."""


def test_what_does_not_fit_is_not_kept() -> None:
    memory = StreamMemory(100)
    first, second = Stream(), Stream()
    assert memory.keep(first, 60)
    assert not memory.keep(second, 50)
    assert memory.held == 60
    assert memory.keep(second, 40)
    assert memory.held == 100


def test_a_stream_that_outgrows_the_budget_gives_all_back() -> None:
    memory = StreamMemory(100)
    first, second = Stream(), Stream()
    assert memory.keep(first, 60) and memory.keep(second, 30)
    assert not memory.keep(first, 80)
    assert memory.held == 30
    assert memory.keep(second, 100)


def test_a_stream_that_is_gone_holds_nothing() -> None:
    memory = StreamMemory(100)
    stream = Stream()
    memory.keep(stream, 100)
    del stream
    assert memory.held == 0
