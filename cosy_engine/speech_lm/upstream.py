"""Generation exactly as the public code does it, where `decoding` deliberately differs.

Only the id `speech_token_size` is withheld before the minimum length (which is not CosyVoice3's end), and in text
streaming the forced fill id is not fed back, one more text token has to arrive before each block, the last embedding
is fed a second time when the text has ended, and then no length is too short or too long.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import torch

from cosy_engine.errors import CosyError
from cosy_engine.modules.qwen2_lm import KVCache
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import (
    Choose,
    SpeechCodeLM,
    Steps,
    TextInbox,
    Waiting,
    decode_to_end,
    next_scores,
    split_instruction,
)


def unistream(lm: SpeechCodeLM, request: SpeechLMRequest, choose: Choose) -> Steps:
    """Speech codes for a known text."""
    prompt = lm.prompt(request.prompt_text + request.text, request.prompt_speech)
    limits = request.length_limits(len(request.text))
    yield from decode_to_end(lm, KVCache(), prompt, choose, [], limits, withheld_ids(lm))


def bistream(
    lm: SpeechCodeLM, request: SpeechLMRequest, inbox: TextInbox, choose: Choose, end_of_prompt: int | None = None
) -> Steps:
    """Speech codes for a text that arrives while it is spoken; arguments as `decoding.bistream`.

    Raises:
        CosyError: a special id other than the fill id was chosen inside a block.
    """
    words_a_block, codes_a_block = lm.mix_ratio
    instruction, words = split_instruction(request.prompt_text, end_of_prompt)
    inbox.tokens.extendleft(reversed(request.text))
    prompt_speech = request.prompt_speech
    next_fill = codes_a_block - len(prompt_speech) % codes_a_block
    cache = KVCache()
    feed = torch.cat([lm.sos, lm.embed_text(instruction)], dim=1)
    decoded: list[int] = []
    while (token := (yield from _next_token(inbox))) is not None:
        words = [*words, token]
        while prompt_speech and len(words) >= words_a_block:
            block = [lm.embed_text(words[:words_a_block]), lm.embed_speech(prompt_speech[:codes_a_block])]
            feed = torch.cat([feed, *block], dim=1)
            words, prompt_speech = words[words_a_block:], prompt_speech[codes_a_block:]
        if prompt_speech:
            continue
        if decoded or feed.shape[1] == 1:
            if len(words) < words_a_block:
                continue
            block = lm.embed_text(words[:words_a_block])
            feed = block if decoded else torch.cat([feed, block], dim=1)
            words = words[words_a_block:]
        while True:
            scores = next_scores(lm, feed, cache)
            if len(decoded) == next_fill:
                code = lm.fill_token
            else:
                scores[withheld_ids(lm)] = float("-inf")
                code = choose(scores, decoded)
            decoded.append(code)
            if code == lm.fill_token:
                next_fill = len(decoded) + codes_a_block
                break
            if code >= lm.speech_token_size:
                raise CosyError(f"The speech LM chose the special id {code} inside a block of text streaming.")
            yield code
            feed = lm.embed_speech([code])
    feed = torch.cat([feed, lm.embed_text(words), lm.task_id], dim=1)
    yield from decode_to_end(lm, cache, feed, choose, decoded, (0, sys.maxsize), withheld_ids(lm))


def withheld_ids(lm: SpeechCodeLM) -> slice:
    """The single id that the public code withholds before the minimum length."""
    return slice(lm.speech_token_size, lm.speech_token_size + 1)


def _next_token(inbox: TextInbox) -> Generator[Waiting, None, int | None]:
    while not inbox.tokens:
        if inbox.closed:
            return None
        yield Waiting.FOR_TEXT
    return inbox.tokens.popleft()
