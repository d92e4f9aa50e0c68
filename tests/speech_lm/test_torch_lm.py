from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing

import pytest
import torch

from cosy_engine.errors import BackendFailedError, EngineStoppedError
from cosy_engine.modules.half_linear import HalfLinear
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import unistream
from cosy_engine.speech_lm.sampling import RasSampler
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from tests.speech_lm.small_lm import TEXT_VOCABULARY, lean, small_lm

ENDLESS = SpeechLMRequest([1, 2, 3], min_ratio=1e9, max_ratio=1e9)


@pytest.fixture
def speech_lm() -> Iterator[TorchSpeechLM]:
    speech_lm = TorchSpeechLM(lean(small_lm(), -2.0))
    yield speech_lm
    speech_lm.close()


def request(number: int) -> SpeechLMRequest:
    return SpeechLMRequest([number + 1] * (3 + number), [2] * number, [7, 8, 9] * number, seed=number)


async def codes_of(iterator: AsyncIterator[int]) -> list[int]:
    return [code async for code in iterator]


async def arriving(tokens: list[int]) -> AsyncIterator[int]:
    for token in tokens:
        await asyncio.sleep(0.001)
        yield token


async def never() -> AsyncIterator[int]:
    await asyncio.Event().wait()
    yield 0


async def becomes(condition: Callable[[], bool]) -> bool:
    for _ in range(2000):
        if condition():
            return True
        await asyncio.sleep(0.005)
    return False


async def test_company_changes_nothing(speech_lm: TorchSpeechLM) -> None:
    def all_of_them() -> list[AsyncIterator[int]]:
        streams = [speech_lm.generate_bistream(request(n), arriving(list(range(12)))) for n in range(2)]
        return [speech_lm.generate(request(n)) for n in range(5)] + streams

    alone = [await codes_of(iterator) for iterator in all_of_them()]
    together = await asyncio.gather(*map(codes_of, all_of_them()))
    assert together == alone
    assert all(len(codes) >= 6 for codes in alone)


async def test_codes_are_those_of_the_model(speech_lm: TorchSpeechLM) -> None:
    with torch.inference_mode():
        expected = list(unistream(lean(small_lm(), -2.0), request(3), RasSampler(request(3).sampling, seed=3)))
    assert await codes_of(speech_lm.generate(request(3))) == expected


async def test_seed_decides(speech_lm: TorchSpeechLM) -> None:
    seeds = [SpeechLMRequest([1, 2, 3, 4], seed=seed) for seed in (5, 5, 6)]
    first, same, other = [await codes_of(speech_lm.generate(request)) for request in seeds]
    assert first == same != other


def test_several_event_loops_at_once(speech_lm: TorchSpeechLM) -> None:
    results: dict[int, list[int]] = {}

    def listen(number: int) -> None:
        results[number] = asyncio.run(codes_of(speech_lm.generate(request(number))))

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: asyncio.run(codes_of(speech_lm.generate(request(n)))) for n in range(4)}


async def test_aclose_frees_the_sequence(speech_lm: TorchSpeechLM) -> None:
    iterator = speech_lm.generate(ENDLESS)
    await anext(iterator)
    assert speech_lm.live == 1
    await iterator.aclose()
    assert await becomes(lambda: speech_lm.live == 0)


async def test_dropping_the_iterator_frees_the_sequence(speech_lm: TorchSpeechLM) -> None:
    iterator = speech_lm.generate(ENDLESS)
    await anext(iterator)
    del iterator
    gc.collect()
    assert await becomes(lambda: speech_lm.live == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_listener_frees_the_sequence(speech_lm: TorchSpeechLM, stream: bool) -> None:
    iterator = speech_lm.generate_bistream(ENDLESS, never()) if stream else speech_lm.generate(ENDLESS)
    task = asyncio.create_task(codes_of(iterator))
    assert await becomes(lambda: speech_lm.live == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await becomes(lambda: speech_lm.live == 0)


def test_a_closed_event_loop_frees_the_sequence(speech_lm: TorchSpeechLM) -> None:
    loop = asyncio.new_event_loop()
    iterator = speech_lm.generate(ENDLESS)
    loop.run_until_complete(anext(iterator))
    loop.close()
    deadline = time.monotonic() + 10
    while speech_lm.live and time.monotonic() < deadline:
        time.sleep(0.005)
    assert speech_lm.live == 0


async def test_a_failing_request_fails_alone(speech_lm: TorchSpeechLM) -> None:
    outcomes = await asyncio.gather(
        codes_of(speech_lm.generate(SpeechLMRequest([TEXT_VOCABULARY]))),
        codes_of(speech_lm.generate(request(2))),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], IndexError)
    assert outcomes[1] == await codes_of(speech_lm.generate(request(2)))
    assert speech_lm.live == 0


async def test_waiting_for_text_blocks_nobody(speech_lm: TorchSpeechLM) -> None:
    waiting = asyncio.create_task(codes_of(speech_lm.generate_bistream(request(0), never())))
    assert await becomes(lambda: speech_lm.live == 1)
    assert len(await codes_of(speech_lm.generate(request(1)))) >= 8
    assert not waiting.done()
    waiting.cancel()


async def test_failure_of_the_text_reaches_the_listener(speech_lm: TorchSpeechLM) -> None:
    async def broken() -> AsyncIterator[int]:
        for token in range(7):
            yield token
        raise ValueError("the text broke off")

    with pytest.raises(ValueError, match="broke off"):
        await codes_of(speech_lm.generate_bistream(request(0), broken()))
    assert await becomes(lambda: speech_lm.live == 0)


async def test_closing_ends_everything(speech_lm: TorchSpeechLM) -> None:
    async with aclosing(speech_lm.generate(ENDLESS)) as running:
        await anext(running)
        waiting = asyncio.create_task(codes_of(speech_lm.generate_bistream(request(0), never())))
        assert await becomes(lambda: speech_lm.live == 2)
        speech_lm.close()
        with pytest.raises(EngineStoppedError):
            await codes_of(running)
        with pytest.raises(EngineStoppedError):
            await waiting
    with pytest.raises(EngineStoppedError):
        await codes_of(speech_lm.generate(request(1)))
    assert speech_lm.live == 0


@pytest.mark.parametrize("upstream_exact", [False, True])
def test_single_rows_are_read_as_float16_if_nothing_is_lost(upstream_exact: bool) -> None:
    lm = small_lm().half().float()
    TorchSpeechLM(lm, upstream_exact=upstream_exact).close()
    assert isinstance(lm.llm_decoder, HalfLinear) is not upstream_exact


@pytest.mark.parametrize("upstream_exact", [False, True])
async def test_what_is_not_a_number_is_an_error_and_not_silence(upstream_exact: bool) -> None:
    lm = small_lm()
    lm.llm_decoder.weight.data[3, 4] = float("nan")
    speech_lm = TorchSpeechLM(lm, upstream_exact=upstream_exact)
    try:
        with pytest.raises(BackendFailedError, match="not a number"):
            await codes_of(speech_lm.generate(request(1)))
    finally:
        speech_lm.close()


async def test_upstream_exact_uses_the_public_sampling_and_limits() -> None:
    public = TorchSpeechLM(lean(small_lm(3), 100.0), upstream_exact=True)
    ours = TorchSpeechLM(lean(small_lm(3), 100.0))
    try:
        assert await codes_of(public.generate(request(1))) == []
        assert len(await codes_of(ours.generate(request(1)))) == 8
    finally:
        public.close()
        ours.close()
