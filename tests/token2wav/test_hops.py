from __future__ import annotations

from itertools import islice

import pytest

from cosy_engine.config import HopSettings
from cosy_engine.token2wav.hops import PACES, Pace, first_hop, hops

CPU, GPU = PACES["cpu"], PACES["cuda"]
TOKENS_PER_SECOND = 25


def first_hops(count: int, first: int, held_back: float, pace: Pace, **settings: int) -> list[int]:
    return list(islice(hops(first, held_back, pace, HopSettings(**settings)), count))


def in_hand_after(first: int, held_back: float, pace: Pace) -> list[float]:
    """What the listener still has, in tokens, when each of the next chunks is made."""
    in_hand, rest = first - held_back, []
    for hop in first_hops(40, first, held_back, pace):
        rest.append(in_hand - hop * pace.rtf - pace.wait * TOKENS_PER_SECOND)
        in_hand = rest[-1] + hop
    return rest


@pytest.mark.parametrize("held_back", [0, 2.5, 10])
@pytest.mark.parametrize("first", [20, 22, 25, 47, 100])
@pytest.mark.parametrize("pace", [CPU, GPU], ids=["cpu", "cuda"])
def test_no_listener_runs_dry(first: int, held_back: float, pace: Pace) -> None:
    assert min(in_hand_after(first, held_back, pace)) >= 0


@pytest.mark.parametrize("held_back", [0, 2.5, 5, 10])
def test_the_short_first_chunk_of_a_gpu_lasts_until_the_next(held_back: float) -> None:
    first = first_hop(22, held_back, GPU)
    assert first < 22 and first - held_back >= 5
    assert min(in_hand_after(first, held_back, GPU)) >= 0


def test_a_cpu_starts_with_a_whole_mask_chunk_and_no_device_with_more() -> None:
    assert first_hop(22, 10, CPU) == 22
    assert first_hop(22, 20, GPU) == 22


def test_hops_are_short_at_first_and_grow_to_the_longest() -> None:
    grown = first_hops(40, 22, 10, CPU)
    assert grown == sorted(grown)
    assert grown[0] == 15 and grown[-1] == 100
    assert set(grown) <= {15, 20, 25, 50, 100}


def test_a_fast_machine_has_whole_hops_soon() -> None:
    assert first_hops(5, 15, 10, GPU) == [5, 10, 25, 50, 100]
    assert first_hops(4, 22, 10, Pace(rtf=0.3, wait=0.0, starts_short=True)) == [25, 50, 100, 100]


def test_hops_stay_within_the_settings() -> None:
    assert set(first_hops(40, 25, 0, CPU, token_max_hop_len=25)) <= {20, 25}
    assert first_hops(40, 100, 0, CPU, stream_scale_factor=1)[-1] == 25
    assert set(first_hops(40, 50, 0, CPU, token_hop_len=10, token_max_hop_len=40)) == {40}


def test_a_first_chunk_that_gives_nothing_to_hear_is_followed_by_the_shortest_hop() -> None:
    assert first_hops(1, 5, 10, CPU) == [5]
