from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosy_engine.modules.attention import attend, attention_masks, no_past, past_lengths
from cosy_engine.modules.key_values import KeyValues
from cosy_engine.modules.streaming import fork_state, stack_states

CPU = torch.device("cpu")


@pytest.mark.parametrize("past", [0, 4, 5, 13])
@pytest.mark.parametrize("new", [1, 5, 7, 20])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_position_sees_its_chunk_and_all_before(past: int, new: int, chunk: int) -> None:
    keys = past + new
    expected = torch.tensor(
        [[not chunk or key < past + (query // chunk + 1) * chunk for key in range(keys)] for query in range(new)]
    )
    (mask,) = attention_masks([past], new, chunk, CPU)
    seen = torch.ones(new, keys, dtype=torch.bool) if mask is None else mask[0, 0].expand(new, keys)
    assert torch.equal(seen, expected)
    assert (mask is None) == bool(expected.all())


def test_padding_is_hidden_as_key_for_every_query() -> None:
    valid = torch.tensor([[[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]]])
    mask = attention_masks([2], 3, 0, CPU, valid)[0].expand(2, 1, 3, 5)
    assert mask[0].all()
    assert mask[1, 0].tolist() == [[True, True, True, False, False]] * 3


def test_padding_and_chunks_together() -> None:
    (mask,) = attention_masks([0], 4, 2, CPU, torch.tensor([[[True, True, True, False]]]))
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


def test_streams_of_different_pasts_and_padding_share_a_batch() -> None:
    draw = torch.randn(3, 2, 3, 4, 2, 6, 8, generator=torch.Generator().manual_seed(0))  # kind, stream, rows ...
    befores, (query, key, value) = draw[:, :, 0, 0, :, :5], draw[:, :, 1, 1]
    states = [no_past(1, 2, 8, CPU, torch.float32) for _ in range(2)]
    for stream, (state, past) in enumerate(zip(states, (2, 5), strict=True)):
        state["past"].append(befores[1, stream : stream + 1, :, :past], befores[2, stream : stream + 1, :, :past])
    apart = [fork_state(state) for state in states]

    valid = torch.ones(2, 1, 6)
    valid[1, 0, 4:] = 0
    masks = attention_masks([2, 5], 6, 3, CPU, valid)
    together = attend(query, key, value, masks, stack_states(states))
    for stream, (state, count) in enumerate(zip(apart, (6, 4), strict=True)):
        new = (part[stream : stream + 1, :, :count] for part in (query, key, value))
        alone = attend(*new, attention_masks(past_lengths(state), count, 3, CPU), state)
        torch.testing.assert_close(together[stream : stream + 1, :, :count], alone)


def test_keys_that_are_there_are_not_copied_again_with_each_chunk() -> None:
    past = KeyValues.empty(1, 2, 4, CPU, torch.float32)
    assert len(_moves(past)) < 25
    assert past.length == 5000
    assert past.nbytes < 1.8 * 2 * 5000 * 2 * 4 * 4


def test_no_chunk_is_late_because_the_keys_of_all_layers_move() -> None:
    moves = [_moves(KeyValues.empty(1, 2, 4, CPU, torch.float32)) for _ in range(30)]
    for chunk in range(20, 100):
        assert sum(chunk in own for own in moves) < 15


def _moves(past: KeyValues) -> list[int]:
    """Which of a hundred chunks of 50 positions found no room."""
    moves, where = [], None
    for chunk in range(100):
        past.append(*torch.randn(2, 1, 2, 50, 4))
        if past.keys.data_ptr() != where:
            moves.append(chunk)
        where = past.keys.data_ptr()
    return moves


def test_a_fork_and_its_original_go_on_independently() -> None:
    original = KeyValues.empty(1, 1, 2, CPU, torch.float32)
    steps = torch.randn(3, 2, 1, 1, 10, 2)
    original.append(*steps[0])
    fork = original.fork()
    assert fork.keys.data_ptr() == original.keys.data_ptr()
    original.append(*steps[1])
    fork.append(*steps[2])
    assert torch.equal(original.keys, torch.cat([steps[0, 0], steps[1, 0]], dim=2))
    assert torch.equal(fork.values, torch.cat([steps[0, 1], steps[2, 1]], dim=2))


def test_attention_without_a_past_is_plain_attention() -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value, [None]), expected)
