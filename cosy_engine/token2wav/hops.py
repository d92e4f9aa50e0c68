"""Where the chunks of a stream end."""

from __future__ import annotations

from collections.abc import Iterator

from cosy_engine.config import HopSettings


def _hops(settings: HopSettings) -> Iterator[int]:
    if settings.token_hop_len_first is not None:
        yield settings.token_hop_len_first
    hop = settings.token_hop_len
    while True:
        yield hop
        hop = min(max(settings.token_max_hop_len, settings.token_hop_len), hop * settings.stream_scale_factor)


def chunk_ends(prompt_tokens: int, chunk_size: int, settings: HopSettings) -> Iterator[int]:
    """Token positions, counted from the first prompt token, where the chunks of one request end.

    Every end is a multiple of `chunk_size` (the chunk of the attention masks), so that each chunk is final once made.
    With the default settings these are the public code's chunks: 25 tokens and what pads the prompt to a multiple of
    25, then 50, 100, 100, ...
    """
    position = prompt_tokens
    for hop in _hops(settings):
        position = -(-(position + hop) // chunk_size) * chunk_size
        yield position
