from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cosy_engine.modules.qwen2_lm import KVCache, Qwen2Encoder
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import TextInbox, bistream, unistream
from cosy_engine.speech_lm.graphed_step import GraphedStep
from cosy_engine.speech_lm.sampling import RasSampler
from tests.speech_lm.small_lm import lean, small_lm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=DEVICES)
def encoder(request: pytest.FixtureRequest) -> Qwen2Encoder:
    return small_lm().llm.to(request.param)


def inputs(encoder: Qwen2Encoder, count: int, seed: int) -> Tensor:
    like = encoder.model.model.norm.weight
    return torch.randn(1, count, len(like), generator=torch.Generator().manual_seed(seed)).to(like)


def same_content(one: KVCache, other: KVCache) -> None:
    assert one.length == other.length
    for ours, theirs in ((one.keys, other.keys), (one.values, other.values)):
        torch.testing.assert_close(ours[..., : one.length, :], theirs[..., : one.length, :])


@pytest.mark.parametrize("before", [1, 7, 255, 256, 300])
def test_a_step_of_fixed_shape_is_the_plain_one(encoder: Qwen2Encoder, before: int) -> None:
    plain, padded = KVCache(), KVCache()
    given, new = inputs(encoder, before, 1), inputs(encoder, 1, 2)
    for cache in (plain, padded):
        encoder(given, cache)
    expected = encoder(new, plain)
    encoder.reserve(padded, before + 1, new)
    position = torch.tensor([before], device=new.device)
    torch.testing.assert_close(encoder.step(new, position, padded), expected)
    padded.length += 1
    same_content(padded, plain)


def test_sequences_in_turn_and_out_of_graphs(encoder: Qwen2Encoder) -> None:
    """Three sequences share the graphs, one is fed several positions at once in between, all outgrow them."""
    step = GraphedStep(encoder, capacities=(256, 512))
    caches = [KVCache() for _ in range(3)]
    plain = [KVCache() for _ in range(3)]
    for number, (cache, other) in enumerate(zip(caches, plain, strict=True)):
        given = inputs(encoder, 250 + 2 * number, number)
        encoder(given, cache)
        encoder(given, other)
    for turn in range(12):
        for number, (cache, other) in enumerate(zip(caches, plain, strict=True)):
            if turn == 6:
                given = inputs(encoder, 2 if number else 254, 50 + number)
                torch.testing.assert_close(encoder.extend(given, cache), encoder.extend(given, other))
            for repeat in range(1 + number % 2):
                new = inputs(encoder, 1, 1000 * turn + 10 * number + repeat)
                torch.testing.assert_close(step(new, cache), encoder.extend(new, other))
    for cache, other in zip(caches, plain, strict=True):
        same_content(cache, other)
    assert [cache.capacity for cache in caches] == [1024, 512, 512]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_codes_are_the_same(version: int, device: str) -> None:
    lm = lean(small_lm(version), -2.0).to(device)
    request = SpeechLMRequest([3] * 12, [2] * 5, [7, 8, 9] * 3, seed=5)
    inbox = TextInbox(closed=True)
    inbox.tokens.extend(range(20))

    def codes() -> list[list[int]]:
        sampler = [RasSampler(request.sampling, request.seed) for _ in range(2)]
        whole = list(unistream(lm, request, sampler[0]))
        return [whole, list(bistream(lm, request, TextInbox(inbox.tokens.copy(), closed=True), sampler[1]))]

    expected = codes()
    lm.llm.single_step = GraphedStep(lm.llm)
    assert codes() == expected
    assert min(map(len, expected)) > 20
