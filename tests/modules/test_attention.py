from __future__ import annotations

import pytest
import torch

from cosy_engine.modules.attention import attention_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("past", [0, 4, 5, 13])
@pytest.mark.parametrize("new", [1, 5, 7, 20])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_position_sees_its_chunk_as_fed_and_all_before(past: int, new: int, chunk: int) -> None:
    keys = past + new
    expected = torch.tensor(
        [[not chunk or key < (query // chunk + 1) * chunk for key in range(keys)] for query in range(past, keys)]
    )
    mask = attention_mask(past, new, chunk, CPU)
    seen = torch.ones(new, keys, dtype=torch.bool) if mask is None else mask[0, 0].expand(new, keys)
    assert torch.equal(seen, expected)
    assert (mask is None) == bool(expected.all())


def test_padding_is_hidden_as_key_for_every_query() -> None:
    valid = torch.tensor([[[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]]])
    mask = attention_mask(2, 3, 0, CPU, valid).expand(2, 1, 3, 5)
    assert mask[0].all()
    assert mask[1, 0].tolist() == [[True, True, True, False, False]] * 3


def test_padding_and_chunks_together() -> None:
    mask = attention_mask(0, 4, 2, CPU, torch.tensor([[[True, True, True, False]]]))
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
