from __future__ import annotations

from itertools import islice, pairwise

import pytest

from cosy_engine.config import HopSettings
from cosy_engine.token2wav.hops import chunk_ends


def ends(prompt: int, count: int = 5, **settings: int) -> list[int]:
    return list(islice(chunk_ends(prompt, 25, HopSettings(**settings)), count))


@pytest.mark.parametrize("prompt", [0, 1, 24, 25, 31, 50, 77])
def test_without_delay_the_hop_grows_as_in_the_public_code(prompt: int) -> None:
    padding = -prompt % 25
    first = prompt + 25 + padding
    assert ends(prompt, stream_grow_after=1) == [first, first + 50, first + 150, first + 250, first + 350]


@pytest.mark.parametrize("rtf", [0.3, 0.7, 0.8])
def test_a_listener_never_waits_for_a_chunk_that_was_made_too_long(rtf: float) -> None:
    positions = ends(0, 40)
    hops = [end - start for start, end in pairwise([0, *positions])]
    assert hops[0] == 25 and hops[-1] == 100
    in_hand = hops[0]
    for hop in hops[1:]:
        assert in_hand >= rtf * hop, f"runs dry before a chunk of {hop} tokens"
        in_hand += (1 - rtf) * hop


def test_constant_hop() -> None:
    assert ends(31, stream_scale_factor=1) == [75, 100, 125, 150, 175]


@pytest.mark.parametrize("prompt", [0, 13, 25, 31])
def test_a_smaller_first_hop_still_ends_on_a_mask_chunk(prompt: int) -> None:
    first, second, *_ = ends(prompt, token_hop_len_first=10)
    assert first % 25 == 0 and 10 <= first - prompt < 35
    assert second == first + 25


@pytest.mark.parametrize("hop", [7, 30, 40])
def test_hops_that_are_no_multiple_of_the_mask_chunk_are_rounded_up(hop: int) -> None:
    positions = ends(31, token_hop_len=hop)
    assert all(end % 25 == 0 for end in positions)
    assert positions[0] - 31 >= hop
