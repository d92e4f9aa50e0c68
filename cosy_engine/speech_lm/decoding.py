"""Generation as plain generators: each `next()` does one step of one sequence and yields its speech code.

Nothing here knows of threads or of other sequences; whoever runs a generator decides when it goes on. Closing it frees
what it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from cosy_engine.errors import BackendFailedError
from cosy_engine.modules.qwen2_lm import CosyVoice3LM, KVCache, Qwen2LM
from cosy_engine.speech_lm.base import SpeechLMRequest

SpeechCodeLM = Qwen2LM | CosyVoice3LM
Choose = Callable[[Tensor, Sequence[int]], int]
"""Picks the next id from log-probabilities [V] on the CPU and the ids so far."""


class Waiting(Enum):
    """Yielded instead of a code by a sequence that cannot go on before more text arrives."""

    FOR_TEXT = "for text"


Steps = Generator[int | Waiting, None, None]


@dataclass
class TextInbox:
    """Text token ids on their way to a sequence; `closed` once no more will come."""

    tokens: deque[int] = field(default_factory=deque)
    closed: bool = False


def unistream(lm: SpeechCodeLM, request: SpeechLMRequest, choose: Choose) -> Steps:
    """Speech codes for a known text; no id that ends the speech is chosen before the minimum length."""
    prompt = lm.prompt(request.prompt_text + request.text, request.prompt_speech)
    limits = request.length_limits(len(request.text))
    yield from decode_to_end(lm, KVCache(), prompt, choose, [], limits, stop_ids(lm))


def bistream(
    lm: SpeechCodeLM, request: SpeechLMRequest, inbox: TextInbox, choose: Choose, end_of_prompt: int | None = None
) -> Steps:
    """Speech codes for a text that arrives while it is spoken.

    The sequence is a chain of blocks of text tokens and speech codes (5 and 15), the first ones from the prompt, as in
    training: there the fill id is what follows a block, but it is never an input. When the text ends, its rest, the
    task id and what remains of the prompt's speech follow, and from there on it is `unistream`.

    Args:
        end_of_prompt: in CosyVoice3, the token that ends the instruction with which the prompt text starts; the
            instruction comes before the first block.
    """
    words_a_block, codes_a_block = lm.mix_ratio
    instruction, prompt_text = split_instruction(request.prompt_text, end_of_prompt)
    waiting = deque([*prompt_text, *request.text])
    prompt_speech = deque(request.prompt_speech)
    cache = KVCache()
    feed = torch.cat([lm.sos, lm.embed_text(instruction)], dim=1)
    decoded: list[int] = []
    text_tokens = len(request.text)
    while True:
        while len(waiting) < words_a_block and not (inbox.closed and not inbox.tokens):
            if inbox.tokens:
                waiting.append(inbox.tokens.popleft())
                text_tokens += 1
            else:
                yield Waiting.FOR_TEXT
        if len(waiting) < words_a_block:
            break
        given = take(prompt_speech, codes_a_block)
        feed = torch.cat([feed, lm.embed_text(take(waiting, words_a_block)), lm.embed_speech(given)], dim=1)
        for _ in range(codes_a_block - len(given)):
            scores = next_scores(lm, feed, cache)
            scores[stop_ids(lm)] = float("-inf")
            code = choose(scores, decoded)
            decoded.append(code)
            yield code
            feed = lm.embed_speech([code])
    feed = torch.cat([feed, lm.embed_text(waiting), lm.task_id, lm.embed_speech(prompt_speech)], dim=1)
    yield from decode_to_end(lm, cache, feed, choose, decoded, request.length_limits(text_tokens), stop_ids(lm))


def decode_to_end(
    lm: SpeechCodeLM,
    cache: KVCache,
    feed: Tensor,
    choose: Choose,
    decoded: list[int],
    limits: tuple[int, int],
    masked: slice,
) -> Steps:
    """Feed `feed` and go on, code by code, until a stop id is chosen.

    `decoded` holds the ids so far and grows. `limits` are the fewest and the most that it may hold; as long as there
    are too few, the ids in `masked` are never chosen.
    """
    fewest, most = limits
    while len(decoded) < most:
        scores = next_scores(lm, feed, cache)
        if len(decoded) < fewest:
            scores[masked] = float("-inf")
        code = choose(scores, decoded)
        if code >= lm.speech_token_size:
            return
        decoded.append(code)
        yield code
        feed = lm.embed_speech([code])


def next_scores(lm: SpeechCodeLM, feed: Tensor, cache: KVCache) -> Tensor:
    """Log-probabilities [V] of the next id after `feed`, on the CPU.

    Raises:
        BackendFailedError: they are not numbers, as when half precision is too narrow for a model.
    """
    scores = lm.next_scores(feed, cache)[0].cpu()
    if scores[0].isnan():
        raise BackendFailedError(
            "The speech LM computed something that is not a number. If it runs in half precision, turn that off "
            "(fp16, COSY_FP16), and save weights that are stored as float16 as float32."
        )
    return scores


def stop_ids(lm: SpeechCodeLM) -> slice:
    """All ids that are not speech codes."""
    return slice(lm.speech_token_size, None)


def split_instruction(prompt_text: list[int], end_of_prompt: int | None) -> tuple[list[int], list[int]]:
    """The prompt text up to and with `end_of_prompt` (nothing, if it is not there), and the rest."""
    cut = prompt_text.index(end_of_prompt) + 1 if end_of_prompt in prompt_text else 0
    return prompt_text[:cut], prompt_text[cut:]


def take(source: deque[int], count: int) -> list[int]:
    """Remove and return the first `count` items, or as many as there are."""
    return [source.popleft() for _ in range(min(count, len(source)))]
