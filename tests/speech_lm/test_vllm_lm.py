"""Generates with a real vLLM. One process serves most tests; what ends it comes last in the file."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosy_engine.checkpoint.load import load_speech_lm
from cosy_engine.compat import AutoModel
from cosy_engine.config import Settings, VllmSettings
from cosy_engine.errors import BackendFailedError, BackendUnavailableError, EngineStoppedError, InvalidRequestError
from cosy_engine.modules.qwen2_lm import KVCache
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.sampling import GREEDY, SamplingSettings
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from cosy_engine.speech_lm.vllm_engine import Generation
from cosy_engine.speech_lm.vllm_export import export_model
from cosy_engine.speech_lm.vllm_lm import VllmSpeechLM
from cosy_engine.speech_lm.vllm_plugin import ras_argument
from tests.recordings import encoded, hum
from tests.speech_lm.test_sampling import p_value, two_step_counts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
]

same_rounding = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM on a GPU rounds otherwise than PyTorch on a CPU, which decides some draws"
)

RAS = SamplingSettings()
QUICK = VllmSettings(
    dtype="float32",
    max_num_seqs=16,
    max_model_len=1024,
    args={"enforce_eager": True, "kv_cache_memory_bytes": 2**27},
)
CHINESE_AND_ENGLISH = "你好，今天天气不错。 Good morning, this is a test."


@pytest.fixture(scope="module")
def model(standin_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoModel]:
    """CosyVoice2's stand-in with its speech LM on vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        settings = Settings(device="cpu", voices_dir=tmp_path_factory.mktemp("voices"), vllm=QUICK)
        with AutoModel(standin_v2, load_vllm=True, settings=settings) as model:
            yield model


@pytest.fixture(scope="module")
def speech_lm(model: AutoModel) -> VllmSpeechLM:
    return model.engine._speech_lm


@pytest.fixture(scope="module")
def torch_lm(standin_v2: Path) -> Iterator[TorchSpeechLM]:
    speech_lm = TorchSpeechLM(load_speech_lm(standin_v2))
    yield speech_lm
    speech_lm.close()


def request(number: int, sampling: SamplingSettings = RAS) -> SpeechLMRequest:
    text = [100 + number * 7 + step for step in range(8 + number % 5)]
    return SpeechLMRequest(text, [50, 60 + number], [number, 17, 3000] * (number % 4), number, sampling)


ENDLESS = replace(request(0), min_ratio=100.0, max_ratio=100.0)


async def codes_of(codes: AsyncIterator[int]) -> list[int]:
    return [code async for code in codes]


async def all_codes(speech_lm: VllmSpeechLM | TorchSpeechLM, requests: list[SpeechLMRequest]) -> list[list[int]]:
    return await asyncio.gather(*(codes_of(speech_lm.generate(request)) for request in requests))


async def arriving(tokens: list[int]) -> AsyncIterator[int]:
    for token in tokens:
        await asyncio.sleep(0.001)
        yield token


async def never() -> AsyncIterator[int]:
    await asyncio.Event().wait()
    yield 0


async def becomes(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


def agreeing(ours: list[list[int]], expected: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(ours, expected, strict=True))


async def test_greedy_codes_are_those_of_pytorch(speech_lm: VllmSpeechLM, torch_lm: TorchSpeechLM) -> None:
    requests = [request(number, GREEDY) for number in range(12)]
    expected = await all_codes(torch_lm, requests)
    assert await all_codes(speech_lm, requests) == expected
    assert len({tuple(codes) for codes in expected}) == 12


@same_rounding
async def test_sampled_codes_are_those_of_pytorch(speech_lm: VllmSpeechLM, torch_lm: TorchSpeechLM) -> None:
    settings = [RAS, SamplingSettings(0.9, 50, 4, 0.5), GREEDY, SamplingSettings(1.0, 10, 30, 0.05)]
    requests = [replace(request(number, settings[number % 4]), min_ratio=8.0) for number in range(16)]
    expected = await all_codes(torch_lm, requests)
    ours = await all_codes(speech_lm, requests)
    assert agreeing(ours, expected) >= 15  # rounding may decide a draw, once in a very long time
    assert sum(map(len, expected)) > 800


async def test_the_seed_decides_and_company_does_not(speech_lm: VllmSpeechLM) -> None:
    same = [replace(request(3), seed=seed) for seed in (5, 5, 6)]
    alone = [await codes_of(speech_lm.generate(request)) for request in same]
    together = await all_codes(speech_lm, same)
    assert alone == together
    assert alone[0] == alone[1] != alone[2]


@same_rounding
@pytest.mark.parametrize("first", [1, 7, 1000])
async def test_a_rest_after_the_first_codes_changes_none(
    speech_lm: VllmSpeechLM, torch_lm: TorchSpeechLM, first: int
) -> None:
    requests = [replace(request(number), min_ratio=8.0) for number in range(4)]
    resting = [replace(own, first=first) for own in requests]
    assert await all_codes(speech_lm, resting) == await all_codes(torch_lm, requests)


async def test_while_nobody_asks_for_more_than_the_first_codes_nothing_runs(speech_lm: VllmSpeechLM) -> None:
    async with aclosing(speech_lm.generate(replace(request(0), min_ratio=8.0, first=5))) as codes:
        for _ in range(5):
            await anext(codes)
        for _ in range(200):
            if not speech_lm.engine.live:
                break
            await asyncio.sleep(0.01)
        assert not speech_lm.engine.live
        assert await anext(codes, None) is not None


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(RAS, marks=same_rounding)])
async def test_text_that_arrives_gives_the_codes_of_pytorch(
    speech_lm: VllmSpeechLM, torch_lm: TorchSpeechLM, sampling: SamplingSettings
) -> None:
    requests = [replace(request(number, sampling), prompt_speech=[9] * (10 * number)) for number in range(4)]
    text = list(range(200, 223))
    ours = await asyncio.gather(*(codes_of(speech_lm.generate_bistream(r, arriving(text))) for r in requests))
    expected = await asyncio.gather(*(codes_of(torch_lm.generate_bistream(r, arriving(text))) for r in requests))
    assert agreeing(ours, expected) >= (4 if sampling == GREEDY else 3)


async def test_draws_follow_the_two_step_procedure(speech_lm: VllmSpeechLM, standin_v2: Path) -> None:
    settings = RAS
    prompt = request(1)
    lm = load_speech_lm(standin_v2)
    with torch.inference_mode():
        given = lm.prompt(prompt.prompt_text + prompt.text, prompt.prompt_speech)
        scores = lm.next_scores(given, KVCache())[0]
    scores = scores.index_fill(0, torch.arange(6561, len(scores)), float("-inf"))
    likely = scores.topk(6).indices.tolist()
    repeated = [likely[0], likely[2], likely[0], likely[5]]
    ids = speech_lm._vocabulary
    ids_given = ids.prompt(prompt.prompt_text + prompt.text, prompt.prompt_speech)

    async def one(seed: int) -> int:
        extra = ras_argument(settings, seed, repeated, fewest=1)
        [drawn] = await codes_of(speech_lm.engine.generate(Generation(ids_given, 1, ids.stop_ids, extra)))
        return drawn

    drawn = torch.tensor(await asyncio.gather(*(one(seed) for seed in range(1500)))).bincount(minlength=len(scores))
    many = two_step_counts(scores, repeated, settings, 400_000).double()
    plain = two_step_counts(scores, [], settings, 400_000).double()
    assert p_value(drawn, many / many.sum()) > 1e-3
    assert p_value(drawn, plain / plain.sum()) < 1e-6


@pytest.mark.parametrize(("fewest", "most"), [(0.0, 0.0), (1.0, 1.0), (6.0, 6.0), (15.0, 20.0)])
async def test_limits_hold(speech_lm: VllmSpeechLM, fewest: float, most: float) -> None:
    limited = [replace(request(number), min_ratio=fewest, max_ratio=most) for number in range(4)]
    for request_, codes in zip(limited, await all_codes(speech_lm, limited), strict=True):
        low, high = request_.length_limits(len(request_.text))
        assert low <= len(codes) <= high
        assert all(0 <= code < 6561 for code in codes)


async def test_a_request_that_is_too_long_is_refused_and_the_next_one_served(speech_lm: VllmSpeechLM) -> None:
    with pytest.raises(InvalidRequestError, match="too long"):
        await codes_of(speech_lm.generate(replace(request(0), prompt_speech=[1] * 1100)))
    assert await codes_of(speech_lm.generate(request(1)))


def test_what_vllm_preloads_is_not_for_other_programs(speech_lm: VllmSpeechLM) -> None:
    assert "gomp" not in os.environ.get("LD_PRELOAD", "")


def test_several_event_loops(speech_lm: VllmSpeechLM) -> None:
    first = asyncio.run(codes_of(speech_lm.generate(request(2))))
    assert asyncio.run(codes_of(speech_lm.generate(request(2)))) == first


def test_a_closed_event_loop_frees_the_request(speech_lm: VllmSpeechLM) -> None:
    loop = asyncio.new_event_loop()
    codes = speech_lm.generate(ENDLESS)
    loop.run_until_complete(anext(codes))
    loop.close()
    assert asyncio.run(becomes(lambda: speech_lm.engine.live == 0))


@pytest.mark.parametrize("way", ["aclose", "drop", "cancel", "cancel while waiting for text"])
async def test_leaving_frees_the_request(speech_lm: VllmSpeechLM, way: str) -> None:
    if way.startswith("cancel"):
        waiting = way.endswith("text")
        request_ = replace(ENDLESS, text=ENDLESS.text[:6]) if waiting else ENDLESS
        codes = speech_lm.generate_bistream(request_, never()) if waiting else speech_lm.generate(request_)
        task = asyncio.create_task(codes_of(codes))
        assert await becomes(lambda: speech_lm.engine.live == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        codes = speech_lm.generate(ENDLESS)
        await anext(codes)
        assert speech_lm.engine.live == 1
        if way == "aclose":
            await codes.aclose()
        del codes
        gc.collect()
    assert await becomes(lambda: speech_lm.engine.live == 0)


async def test_failure_of_the_text_reaches_the_listener(speech_lm: VllmSpeechLM) -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ValueError("the text broke off")

    with pytest.raises(ValueError, match="broke off"):
        await codes_of(speech_lm.generate_bistream(request(0), broken()))
    assert await becomes(lambda: speech_lm.engine.live == 0)


async def test_two_hundred_requests_with_cancels_leave_nothing(speech_lm: VllmSpeechLM) -> None:
    fate = random.Random(0)

    async def listen(number: int) -> None:
        codes = speech_lm.generate(request(number))
        async with aclosing(codes):
            leave_after = fate.choice([0, 1, 5, 30, 1000])
            async for _ in codes:
                leave_after -= 1
                if leave_after <= 0:
                    return

    async def two_hundred() -> None:
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(listen(number)) for number in range(200)]
        for task in tasks:
            await asyncio.sleep(0.005)
            if fate.random() < 0.3:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await becomes(lambda: speech_lm.engine.live == 0)

    expected = await codes_of(speech_lm.generate(request(7)))
    for _ in range(3):  # until each batch size has been used, memory grows
        await two_hundred()
    before = resident_memory()
    await two_hundred()
    assert resident_memory() - before < 30e6
    assert await codes_of(speech_lm.generate(request(7))) == expected


@same_rounding
def test_speech_is_that_of_pytorch(model: AutoModel, standin_v2: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.wav"
    prompt.write_bytes(encoded(hum(3.0)))

    def speech(model: AutoModel) -> torch.Tensor:
        torch.manual_seed(3)
        results = model.inference_zero_shot(CHINESE_AND_ENGLISH, "what it says", prompt, stream=True)
        return torch.cat([result["tts_speech"] for result in results], dim=1)

    with AutoModel(standin_v2, settings=Settings(device="cpu", voices_dir=tmp_path)) as on_pytorch:
        torch.testing.assert_close(speech(model), speech(on_pytorch), atol=0, rtol=0)


async def test_a_crash_ends_what_is_in_flight_and_the_next_request_is_served(speech_lm: VllmSpeechLM) -> None:
    expected = await codes_of(speech_lm.generate(request(7)))
    running = speech_lm.generate(ENDLESS)
    await anext(running)
    [process] = engine_processes()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(BackendFailedError):
        await asyncio.wait_for(codes_of(running), 30)
    assert await codes_of(speech_lm.generate(request(7))) == expected


def test_cosyvoice3_falls_back_to_float32_and_closes(standin_v3: Path, tmp_path: Path) -> None:
    """One process for both: its weights overflow in half precision, as published ones are said to."""
    directory = Path(shutil.copytree(standin_v3, tmp_path / "model"))
    state = torch.load(directory / "llm.pt", weights_only=True)
    state["llm.model.model.layers.0.mlp.down_proj.weight"] *= 1e5
    torch.save(state, directory / "llm.pt")
    lm = load_speech_lm(directory)
    settings = QUICK.model_copy(update={"dtype": "float16"})
    speech_lm = VllmSpeechLM(lm, export_model(directory, tmp_path / "export"), settings)
    torch_lm = TorchSpeechLM(lm)

    async def listen() -> None:
        requests = [request(number, GREEDY) for number in range(6)]
        assert await all_codes(speech_lm, requests) == await all_codes(torch_lm, requests)
        running = speech_lm.generate(ENDLESS)
        await anext(running)
        await asyncio.to_thread(speech_lm.close)
        for codes in (running, speech_lm.generate(ENDLESS)):
            with pytest.raises(EngineStoppedError):
                await codes_of(codes)

    process = engine_processes()[-1]
    try:
        assert speech_lm.engine.dtype == "float32"
        asyncio.run(listen())
    finally:
        speech_lm.close()
        torch_lm.close()
    process.join(10)
    assert not process.is_alive()


def test_an_unknown_argument_is_an_error(standin_v2: Path, tmp_path: Path) -> None:
    settings = VllmSettings(args={"no_such_argument": 1})
    with pytest.raises(BackendUnavailableError, match="no_such_argument"):
        VllmSpeechLM(load_speech_lm(standin_v2), export_model(standin_v2, tmp_path / "export"), settings)


def engine_processes() -> list[multiprocessing.Process]:
    """Oldest first."""
    return sorted(multiprocessing.active_children(), key=lambda child: child.pid)


def resident_memory() -> int:
    """Bytes of this process and of all that it started."""
    import psutil

    gc.collect()
    this = psutil.Process()
    return sum(process.memory_info().rss for process in (this, *this.children(recursive=True)))
