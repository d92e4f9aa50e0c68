from __future__ import annotations

from itertools import islice

import pytest

from cosy_engine.config import HopSettings
from cosy_engine.token2wav.hops import hops


def first_hops(count: int, first: int, held_back: float, rtf: float, **settings: int) -> list[int]:
    return list(islice(hops(first, held_back, rtf, HopSettings(**settings)), count))


@pytest.mark.parametrize("held_back", [0, 2.5, 10])
@pytest.mark.parametrize("first", [20, 22, 25, 47, 100])
@pytest.mark.parametrize("rtf", [0.3, 0.8])
def test_no_listener_runs_dry(first: int, held_back: float, rtf: float) -> None:
    in_hand = first - held_back
    for hop in first_hops(40, first, held_back, rtf):
        assert hop * rtf <= in_hand
        in_hand += hop - hop * rtf


def test_hops_are_short_at_first_and_grow_to_the_longest() -> None:
    grown = first_hops(40, 22, 10, 0.8)
    assert grown == sorted(grown)
    assert grown[0] == 15 and grown[-1] == 100
    assert set(grown) <= {15, 20, 25, 50, 100}


def test_a_fast_machine_starts_with_whole_hops() -> None:
    assert first_hops(4, 22, 10, 0.3) == [25, 50, 100, 100]


def test_hops_stay_within_the_settings() -> None:
    assert set(first_hops(40, 25, 0, 0.8, token_max_hop_len=25)) <= {20, 25}
    assert first_hops(40, 100, 0, 0.8, stream_scale_factor=1)[-1] == 25
    assert set(first_hops(40, 50, 0, 0.8, token_hop_len=10, token_max_hop_len=40)) == {40}


def test_a_first_chunk_that_gives_nothing_to_hear_is_followed_by_the_shortest_hop() -> None:
    assert first_hops(1, 5, 10, 0.8) == [5]
