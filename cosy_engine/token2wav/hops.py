"""Where the chunks of a stream end."""

from __future__ import annotations

from collections.abc import Iterator

from cosy_engine.config import HopSettings

_RAMP = 5  # tokens; hops below the usual one are multiples of it


def _sizes(settings: HopSettings) -> list[int]:
    """Hops that may be used, the largest first."""
    sizes = list(range(_RAMP, settings.token_hop_len, _RAMP)) + [settings.token_hop_len]
    while settings.stream_scale_factor > 1 and sizes[-1] * settings.stream_scale_factor <= settings.token_max_hop_len:
        sizes.append(sizes[-1] * settings.stream_scale_factor)
    return sizes[::-1]


def hops(first: int, held_back: float, rtf: float, settings: HopSettings) -> Iterator[int]:
    """Tokens of each chunk after the first one.

    While a chunk is made the listener lives on what he has. So a hop is the largest that is made before that is
    spent, even if a second of sound takes `rtf` seconds: short ones after a short first chunk, then the usual one, and
    longer ones, which cost less, once there is enough in hand.

    Args:
        first: new tokens of the first chunk.
        held_back: tokens at the end of what was made that the listener does not hear yet.
    """
    sizes = _sizes(settings)
    in_hand = first - held_back
    while True:
        hop = next((size for size in sizes if size * rtf <= in_hand), sizes[-1])
        yield hop
        in_hand += (1 - rtf) * hop
