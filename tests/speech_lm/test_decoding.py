from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cosy_engine.modules.qwen2_lm import CosyVoice3LM, Qwen2LM
from cosy_engine.speech_lm import decoding, upstream
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import TextInbox, Waiting
from cosy_engine.speech_lm.sampling import GREEDY, RasSampler
from tests.speech_lm.small_lm import CODES, lean, small_lm

AVOID, WANT = -100.0, 100.0
END_OF_PROMPT = 70


@pytest.fixture(autouse=True)
def _inference() -> None:
    with torch.inference_mode():
        yield


def sampler() -> RasSampler:
    return RasSampler(GREEDY, seed=0)


def record(lm: Qwen2LM | CosyVoice3LM) -> list[Tensor]:
    """Everything that the backbone is fed from now on, call by call."""
    fed: list[Tensor] = []
    lm.llm.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    return fed


def inbox_of(text: Sequence[int]) -> TextInbox:
    inbox = TextInbox(closed=True)
    inbox.tokens.extend(text)
    return inbox


@pytest.mark.parametrize("version", [2, 3])
def test_known_text_is_laid_out_as_trained(version: int) -> None:
    lm = lean(small_lm(version), AVOID)
    fed = record(lm)
    codes = list(decoding.unistream(lm, SpeechLMRequest([4, 5], [1, 2, 3], [10, 11], max_ratio=4), sampler()))
    layout = [lm.sos, lm.embed_text([1, 2, 3, 4, 5]), lm.task_id, lm.embed_speech([10, 11, *codes[:-1]])]
    torch.testing.assert_close(torch.cat(fed, dim=1), torch.cat(layout, dim=1))


@pytest.mark.parametrize("version", [2, 3])
def test_length_limits(version: int) -> None:
    request = SpeechLMRequest([4, 5, 6], [1, 2], [], min_ratio=2.5, max_ratio=5.5)
    shortest = list(decoding.unistream(lean(small_lm(version), WANT), request, sampler()))
    longest = list(decoding.unistream(lean(small_lm(version), AVOID), request, sampler()))
    assert (len(shortest), len(longest)) == (7, 16)
    assert max(shortest + longest) < CODES


def test_public_code_lets_cosyvoice3_end_too_early() -> None:
    request = SpeechLMRequest([4, 5, 6])
    assert list(upstream.unistream(lean(small_lm(3), WANT), request, sampler())) == []


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("prompt", "given"), [(0, 0), (4, 4), (15, 0), (19, 4)])
def test_arriving_text_is_laid_out_in_blocks(version: int, prompt: int, given: int) -> None:
    lm = lean(small_lm(version), AVOID)
    fed = record(lm)
    speech = list(range(20, 20 + prompt))
    instruction = [60, END_OF_PROMPT] if version == 3 else []
    text = list(range(1, 20))  # prompt text included
    request = SpeechLMRequest(text[7:9], [*instruction, *text[:7]], speech, max_ratio=6)
    codes = list(decoding.bistream(lm, request, inbox_of(text[9:]), sampler(), END_OF_PROMPT))

    layout, words, spoken = [lm.sos, lm.embed_text(instruction)], text, codes
    if prompt >= 15:
        layout += [lm.embed_text(words[:5]), lm.embed_speech(speech[:15])]
        words, speech = words[5:], speech[15:]
    while len(words) >= 5:
        own = 15 - len(speech)
        layout += [lm.embed_text(words[:5]), lm.embed_speech([*speech, *spoken[:own]])]
        words, speech, spoken = words[5:], [], spoken[own:]
    layout += [lm.embed_text(words), lm.task_id, lm.embed_speech(spoken[:-1])]
    torch.testing.assert_close(torch.cat(fed, dim=1), torch.cat(layout, dim=1))
    assert len(codes) == 6 * 12
    assert max(codes) < CODES


def test_a_text_too_short_for_a_block_is_spoken_as_a_known_one() -> None:
    lm = lean(small_lm(2), AVOID)
    known = decoding.unistream(lm, SpeechLMRequest([3, 4], [1, 2], [9] * 20), sampler())
    arriving = decoding.bistream(lm, SpeechLMRequest([], [1, 2], [9] * 20), inbox_of([3, 4]), sampler())
    assert list(arriving) == list(known)


def test_waits_only_when_a_block_lacks_text() -> None:
    inbox = TextInbox()
    steps = decoding.bistream(lean(small_lm(2), WANT), SpeechLMRequest([1, 2, 3]), inbox, sampler())
    assert [next(steps) for _ in range(3)] == [Waiting.FOR_TEXT] * 3
    inbox.tokens.append(4)
    assert next(steps) is Waiting.FOR_TEXT
    inbox.tokens.append(5)
    assert all(isinstance(next(steps), int) for _ in range(15))
    assert next(steps) is Waiting.FOR_TEXT
    inbox.closed = True
    assert list(steps) == []  # 15 codes are enough for five text tokens


@pytest.mark.parametrize("arrivals", [[10], [1] * 10, [4, 1, 5]])
def test_timing_of_the_text_does_not_matter(arrivals: list[int]) -> None:
    lm = lean(small_lm(3), AVOID)
    request = SpeechLMRequest([], [1, 2, 3], [9] * 4, max_ratio=6)
    text = list(range(30, 40))
    at_once = list(decoding.bistream(lm, request, inbox_of(text), sampler()))
    inbox, codes = TextInbox(), []
    for item in (steps := decoding.bistream(lm, request, inbox, sampler())):
        if isinstance(item, int):
            codes.append(item)
        elif arrivals:
            count, arrivals = arrivals[0], arrivals[1:]
            inbox.tokens.extend(text[:count])
            text = text[count:]
        else:
            inbox.closed = True
    steps.close()
    assert codes == at_once


def test_public_text_streaming_feeds_the_last_embedding_twice_and_no_fill() -> None:
    lm = lean(small_lm(2), AVOID)
    fed = record(lm)
    calls = 0

    def choose(scores: Tensor, decoded: Sequence[int]) -> int:
        nonlocal calls
        calls += 1
        return lm.eos_token if calls > 20 else int(scores[:CODES].argmax())

    codes = list(upstream.bistream(lm, SpeechLMRequest([1, 2, 3, 4, 5]), inbox_of([6, 7]), choose))
    assert len(codes) == 20
    layout = [lm.sos, lm.embed_text([1, 2, 3, 4, 5]), lm.embed_speech(codes[:15]), lm.embed_speech(codes[14:15])]
    layout += [lm.embed_text([6, 7]), lm.task_id, lm.embed_speech(codes[15:])]
    torch.testing.assert_close(torch.cat(fed, dim=1), torch.cat(layout, dim=1))
