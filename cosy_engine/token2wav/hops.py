"""Where the chunks of a stream end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cosy_engine.config import HopSettings

_RAMP = 5  # tokens; hops below the usual one are multiples of it


@dataclass(frozen=True)
class Pace:
    """How fast a device makes sound, at worst.

    Attributes:
        rtf: seconds that a second of sound takes.
        wait: seconds that a chunk takes besides, however short it is: its turn among the chunks of others, too.
        starts_short: a short first chunk is made sooner than a usual one; where a token takes as long to make sound of
            as to hear, the chunks after it would have to be short as well.
    """

    rtf: float
    wait: float
    starts_short: bool


PACES = {"cpu": Pace(rtf=0.8, wait=0.0, starts_short=False), "cuda": Pace(rtf=0.3, wait=0.1, starts_short=True)}
_TOKENS_PER_SECOND = 25


def first_hop(usual: int, held_back: float, pace: Pace) -> int:
    """Tokens of the first chunk by default: the usual ones, or enough for a fifth of a second to hear."""
    return min(usual, math.ceil(held_back) + _RAMP) if pace.starts_short else usual


def _sizes(settings: HopSettings) -> list[int]:
    """Hops that may be used, the largest first."""
    sizes = list(range(_RAMP, settings.token_hop_len, _RAMP)) + [settings.token_hop_len]
    while settings.stream_scale_factor > 1 and sizes[-1] * settings.stream_scale_factor <= settings.token_max_hop_len:
        sizes.append(sizes[-1] * settings.stream_scale_factor)
    return sizes[::-1]


def hops(first: int, held_back: float, pace: Pace, settings: HopSettings) -> Iterator[int]:
    """Tokens of each chunk after the first one.

    While a chunk is made the listener lives on what he has. So a hop is the largest that is made before that is
    spent, at the given pace: short ones after a short first chunk, then the usual one, and longer ones, which cost
    less, once there is enough in hand.

    Args:
        first: new tokens of the first chunk.
        held_back: tokens at the end of what was made that the listener does not hear yet.
    """
    sizes = _sizes(settings)
    in_hand = first - held_back
    while True:
        hop = next((size for size in sizes if _spent(size, pace) <= in_hand), sizes[-1])
        yield hop
        in_hand += hop - _spent(hop, pace)


def _spent(hop: int, pace: Pace) -> float:
    """Tokens that are heard while a chunk is made."""
    return pace.wait * _TOKENS_PER_SECOND + pace.rtf * hop
