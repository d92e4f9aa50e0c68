from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.errors import BackendFailedError
from cosy_engine.modules.streaming import state_bytes
from cosy_engine.token2wav.pages import PAGE, PagedStream, PagePool, StoredStream
from cosy_engine.token2wav.scheduler import Scheduler, Urgency, first_sound, runs_dry
from cosy_engine.token2wav.static_estimator import StaticEstimator
from cosy_engine.token2wav.token2wav import Session, Token2Wav
from cosy_engine.token2wav.work import Making, complete
from tests.token2wav.test_session import random_prompt, random_tokens, run

CPU = torch.device("cpu")
SHAPE = (2, 3, 1, 4)  # steps, layers, heads, d
TOLERANCE = 1e-3


def pool_of(pages: int) -> PagePool:
    """With so many pages to be had."""
    page = PagePool(SHAPE, 0, CPU, torch.float32).page_bytes
    return PagePool(SHAPE, (pages + 1) * page, CPU, torch.float32)


def new_stream(pool: PagePool) -> PagedStream:
    return PagedStream(pool, [], 0, 2 * [torch.zeros(2, 5)])


def grow(stream: PagedStream, count: int, value: float) -> None:
    """As the estimator does: positions are written where the stream has room."""
    assert stream.reserve(count)
    for position in range(stream.length, stream.length + count):
        stream.pool.pages[stream.pages[position // PAGE], ..., position % PAGE, :] = value
    stream.length += count


def held(stream: PagedStream) -> list[float]:
    """The value at each position."""
    return [float(stream.pool.pages[stream.pages[n // PAGE], 0, 0, 0, 0, 0, n % PAGE, 0]) for n in range(stream.length)]


def test_a_stream_takes_pages_as_it_grows_and_they_come_back() -> None:
    pool = pool_of(4)
    stream = new_stream(pool)
    for count, free in ((1, 3), (15, 3), (1, 2), (40, 0)):
        grow(stream, count, 1.0)
        assert pool.free == free
    assert not stream.reserve(20)
    assert (stream.length, pool.free) == (57, 0)
    del stream
    assert pool.free == 4


def test_forks_share_pages_and_never_write_into_them() -> None:
    pool = pool_of(8)
    voice = new_stream(pool)
    grow(voice, 20, 1.0)
    first, second = voice.fork(), voice.fork()
    assert pool.free == 6 and first.nbytes < voice.nbytes
    grow(first, 20, 2.0)
    grow(second, 3, 3.0)
    grow(voice, 2, 4.0)
    assert held(voice) == 20 * [1] + 2 * [4]
    assert held(first) == 20 * [1] + 20 * [2]
    assert held(second) == 20 * [1] + 3 * [3]
    assert pool.free == 3  # two more for the first one, one for the second
    fork_of_fork = first.fork()
    del voice, first
    assert held(fork_of_fork) == 20 * [1] + 20 * [2]
    del second, fork_of_fork
    assert pool.free == 8


def test_a_fork_at_a_pages_end_copies_nothing() -> None:
    pool = pool_of(3)
    voice = new_stream(pool)
    grow(voice, PAGE, 1.0)
    fork = voice.fork()
    grow(fork, 1, 2.0)
    assert pool.free == 1


def test_what_is_moved_out_comes_back_if_there_is_room() -> None:
    pool = pool_of(4)
    stream = new_stream(pool)
    grow(stream, 20, 1.0)
    stored = stream.to(torch.device("meta"))
    assert isinstance(stored, StoredStream)
    stored = StoredStream(pool, pool.pages[stream.pages].clone(), stream.length, stream.tails)
    again = stored.to(CPU)
    grow(stream, 1, 2.0)
    assert held(again) == 20 * [1]
    assert stored.to(CPU) is stored  # no room
    del again
    assert isinstance(stored.to(CPU), PagedStream)


def test_who_can_do_without_lets_go() -> None:
    class Owner:
        def __init__(self, stream: PagedStream) -> None:
            self.stream: PagedStream | None = stream

        def let_go(self) -> bool:
            had, self.stream = self.stream, None
            return had is not None

    from weakref import WeakMethod

    pool = pool_of(4)
    owners = [Owner(new_stream(pool)) for _ in range(3)]
    for owner in owners:
        grow(owner.stream, PAGE, 1.0)
        pool.reclaimers.append(WeakMethod(owner.let_go))
    stream = new_stream(pool)
    assert stream.reserve(2 * PAGE)
    assert [owner.stream is None for owner in owners] == [True, False, False]
    assert not stream.reserve(5 * PAGE)  # never, so nobody lets go
    assert [owner.stream is None for owner in owners] == [True, False, False]
    assert stream.reserve(4 * PAGE)
    assert all(owner.stream is None for owner in owners)


@pytest.fixture(params=[2, 12, 30, 60, 1000], ids=lambda pages: f"{pages} pages")
def pages(request: pytest.FixtureRequest, model: CosyVoiceModel) -> Iterator[int]:
    """The model's estimator with so many pages: for no chunk, for no whole stream, for one, for some, for all."""
    decoder = model.flow.decoder
    plain = decoder.estimator
    page = StaticEstimator(plain, steps=10, memory=0, graphs=False).pool.page_bytes
    decoder.estimator = StaticEstimator(plain, steps=10, memory=(request.param + 1) * page, graphs=False)
    yield request.param
    decoder.estimator = plain


def alone(model: CosyVoiceModel, seed: int, prompt: int, count: int) -> torch.Tensor:
    """What a stream sounds like without pages."""
    static, model.flow.decoder.estimator = model.flow.decoder.estimator, model.flow.decoder.estimator.estimator
    session = session_of(Token2Wav(model.flow, model.hift), seed, prompt)
    sound = torch.cat(run(session, random_tokens(count, seed)))
    model.flow.decoder.estimator = static
    return sound


def session_of(token2wav: Token2Wav, seed: int, prompt: int) -> Session:
    return token2wav.session(random_prompt(prompt, seed), HopSettings(), stream=True, seed=seed)


STREAMS = [(0, 31, 120), (1, 77, 60), (2, 150, 193), (3, 31, 20)]  # seed, prompt's tokens, tokens


def test_streams_sound_the_same_however_few_pages_there_are(model: CosyVoiceModel, pages: int) -> None:
    """Chunk by chunk in turn, so that each has to let go for the others."""
    token2wav = Token2Wav(model.flow, model.hift)
    sessions = [session_of(token2wav, seed, prompt) for seed, prompt, _ in STREAMS]
    sounds: list[list[torch.Tensor]] = [[] for _ in STREAMS]
    with torch.inference_mode():
        for session, (seed, _, count) in zip(sessions, STREAMS, strict=True):
            session.push(random_tokens(count, seed))
            session.finish()
        while not all(session.done for session in sessions):
            for session, sound in zip(sessions, sounds, strict=True):
                if not session.done:
                    sound.append(complete(session.chunk()))
    for stream, sound in zip(STREAMS, sounds, strict=True):
        torch.testing.assert_close(torch.cat(sound), alone(model, *stream), atol=TOLERANCE, rtol=0)
    pool = model.flow.decoder.estimator.pool
    del sessions, session, token2wav
    assert pool.free == pages


def test_streams_at_work_at_once_wait_for_each_other(model: CosyVoiceModel, pages: int) -> None:
    token2wav, scheduler = Token2Wav(model.flow, model.hift), Scheduler(4, CPU)

    async def listen(seed: int, prompt: int, count: int) -> torch.Tensor:
        session = session_of(token2wav, seed, prompt)
        session.push(random_tokens(count, seed))
        session.finish()
        sound = []
        while not session.done:
            sound.append(await scheduler.run(session.chunk(), first_sound(seed)))
        return torch.cat(sound)

    async def together() -> list[torch.Tensor]:
        return await asyncio.wait_for(asyncio.gather(*(listen(*stream) for stream in STREAMS)), 120)

    try:
        sounds = asyncio.run(together())
    finally:
        scheduler.close()
    for stream, sound in zip(STREAMS, sounds, strict=True):
        torch.testing.assert_close(sound, alone(model, *stream), atol=TOLERANCE, rtol=0)
    voices = [state["decoder"]["stream"].pages for state in token2wav._voices._tiers[0].states.values()]
    assert model.flow.decoder.estimator.pool.free + sum(map(len, voices)) == pages


def test_a_cancelled_chunk_gives_its_pages_back(model: CosyVoiceModel, pages: int) -> None:
    pool = model.flow.decoder.estimator.pool
    session = session_of(Token2Wav(model.flow, model.hift), 0, 31)
    session.push(random_tokens(60))
    with torch.inference_mode():
        making = session.chunk()
        for _ in range(3):
            work = next(making)
            while not work.done:
                work.run([work])
        making.close()
    del session, work, making
    assert pool.free == pages


@pytest.fixture
def with_pages(model: CosyVoiceModel) -> Iterator[Callable[[int], PagePool]]:
    """Gives the model's estimator so many pages."""
    decoder = model.flow.decoder
    plain = decoder.estimator

    def give(pages: int) -> PagePool:
        page = StaticEstimator(plain, steps=10, memory=0, graphs=False).pool.page_bytes
        decoder.estimator = StaticEstimator(plain, steps=10, memory=(pages + 1) * page, graphs=False)
        return decoder.estimator.pool

    yield give
    decoder.estimator = plain


def kinds(making: Making[torch.Tensor]) -> list[str]:
    """The work of a chunk."""
    done = []
    with torch.inference_mode():
        for work in making:
            done.append(type(work).__name__)
            while not work.done:
                work.run([work])
    return done


def begun(token2wav: Token2Wav, seed: int, chunks: int = 2) -> Session:
    """A stream some of whose sound has been made."""
    session = session_of(token2wav, seed, 31)
    session.push(random_tokens(300, seed))
    for _ in range(chunks):
        kinds(session.chunk())
    return session


def test_who_needs_a_page_is_not_the_one_to_forget(model: CosyVoiceModel, with_pages: Callable) -> None:
    pool = with_pages(100)
    token2wav = Token2Wav(model.flow, model.hift, voice_cache=0)
    first, second, last = (begun(token2wav, seed) for seed in range(3))
    others = new_stream(pool)
    assert others.reserve(PAGE * pool.free)
    assert kinds(last.chunk()) == ["Encode", "EulerSteps", "Vocode"]
    assert (first.in_pages, second.in_pages, last.in_pages) == (True, False, True)


def test_a_voice_that_found_no_room_is_not_kept_beside_the_pool(model: CosyVoiceModel, with_pages: Callable) -> None:
    pool = with_pages(40)
    token2wav = Token2Wav(model.flow, model.hift)
    others = new_stream(pool)
    assert others.reserve(PAGE * pool.free)
    outside = begun(token2wav, 1)
    assert not outside.in_pages and token2wav._memory.held == 0
    del others
    assert begun(token2wav, 1).in_pages


def test_listeners_of_a_new_voice_share_what_one_of_them_computed(model: CosyVoiceModel, with_pages: Callable) -> None:
    pool = with_pages(60)
    token2wav, scheduler = Token2Wav(model.flow, model.hift), Scheduler(8, CPU)
    sessions = [session_of(token2wav, 1, 31) for _ in range(16)]
    for waiting in [scheduler.submit(session.prepare(), first_sound(0)) for session in sessions]:
        waiting.result(60)
    scheduler.close()
    (tier,) = token2wav._voices._tiers
    (voice,) = (state["decoder"]["stream"] for state in tier.states.values())
    assert pool.free == 60 - len(voice.pages)
    assert tier.held == sum(map(state_bytes, tier.states.values()))


def test_the_most_urgent_gets_room_while_others_keep_coming(model: CosyVoiceModel, with_pages: Callable) -> None:
    with_pages(40)
    token2wav, scheduler = Token2Wav(model.flow, model.hift, voice_cache=0), Scheduler(8, CPU)
    heard: list[str] = []

    async def listen(name: str, seed: int, count: int, urgency: Urgency) -> None:
        session = session_of(token2wav, seed, 31)
        session.push(random_tokens(count, seed))
        session.finish()
        while not session.done:
            await scheduler.run(session.chunk(), urgency)
        heard.append(name)

    async def crowd(seed: int) -> None:
        for number in range(6):
            await listen("other", 10 * seed + number, 60, runs_dry(1e9))

    async def together() -> None:
        others = [asyncio.create_task(crowd(seed)) for seed in range(5)]
        await asyncio.sleep(0.5)
        await asyncio.wait_for(listen("urgent", 99, 250, first_sound(0)), 120)
        await asyncio.gather(*others)

    try:
        asyncio.run(together())
    finally:
        scheduler.close()
    assert heard.index("urgent") < 25


def test_who_fails_while_others_are_asked_for_room_fails_alone(
    model: CosyVoiceModel, with_pages: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pages(20)
    token2wav, scheduler = Token2Wav(model.flow, model.hift, voice_cache=0), Scheduler(2, CPU)

    def broken(self: PagedStream, count: int) -> bool:
        raise torch.OutOfMemoryError

    session = session_of(token2wav, 1, 31)
    session.push(random_tokens(60))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(PagedStream, "reserve", broken)
            with pytest.raises(BackendFailedError):
                scheduler.submit(session.chunk(), first_sound(0)).result(60)
        again = session_of(token2wav, 1, 31)
        again.push(random_tokens(60))
        assert len(scheduler.submit(again.chunk(), first_sound(0)).result(60))
    finally:
        scheduler.close()


@torch.inference_mode()
def test_what_is_not_a_number_stays_with_its_stream(model: CosyVoiceModel, with_pages: Callable) -> None:
    with_pages(40)
    token2wav = Token2Wav(model.flow, model.hift, voice_cache=0)
    broken = session_of(token2wav, 1, 31)
    broken._given.feat[:] = torch.nan
    broken.push(random_tokens(60))
    assert complete(broken.chunk()).isnan().any()
    del broken
    assert all(complete(begun(token2wav, seed, chunks=0).chunk()).isfinite().all() for seed in range(3))
