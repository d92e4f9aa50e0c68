"""Where the chunks of a stream end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

from cosy_engine.config import HopSettings


def _hops(settings: HopSettings) -> Iterator[int]:
    if settings.token_hop_len_first is not None:
        yield settings.token_hop_len_first
    hop = settings.token_hop_len
    while True:
        yield from repeat(hop, settings.stream_grow_after)
        hop = min(max(settings.token_max_hop_len, settings.token_hop_len), hop * settings.stream_scale_factor)


def chunk_ends(prompt_tokens: int, chunk_size: int, settings: HopSettings) -> Iterator[int]:
    """Token positions, counted from the first prompt token, where the chunks of one request end.

    Every end is a multiple of `chunk_size` (the chunk of the attention masks), so that each chunk is final once made.
    The first chunk has 25 new tokens by default and what pads the prompt to a multiple of 25, as in the public code.
    Hops grow to 50 and 100 more slowly than there: while a chunk of `n` seconds is made the listener lives on what he
    has, which after five chunks is enough for one of twice the length even if a second takes 0.8 seconds to make.
    """
    position = prompt_tokens
    for hop in _hops(settings):
        position = -(-(position + hop) // chunk_size) * chunk_size
        yield position
