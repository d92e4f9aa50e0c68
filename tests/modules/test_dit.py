from __future__ import annotations

import torch
from torch import nn

from cosy_engine.modules.dit import RotaryEmbedding, rotate_first_heads


def test_rotation_turns_the_pairs_of_the_first_head_only() -> None:
    x = torch.randn(2, 3, 5, 8)
    rotated, rotated_key = rotate_first_heads(x, 2 * x, RotaryEmbedding(8)(torch.arange(7, 12)[None]))
    torch.testing.assert_close(rotated_key, 2 * rotated)
    assert torch.equal(rotated[:, 1:], x[:, 1:])
    pairs = torch.view_as_complex(x[:, 0].unflatten(2, (4, 2)).contiguous())
    for row, position in enumerate(range(7, 12)):
        for pair in range(4):
            angle = torch.tensor(position * 10000 ** (-2 * pair / 8))
            expected = pairs[:, row, pair] * torch.polar(torch.tensor(1.0), angle)
            torch.testing.assert_close(rotated[:, 0, row, 2 * pair], expected.real)
            torch.testing.assert_close(rotated[:, 0, row, 2 * pair + 1], expected.imag)


def test_rotary_frequencies_stay_exact_in_a_16_bit_model() -> None:
    model = nn.Sequential(RotaryEmbedding(64), nn.Linear(2, 2))
    exact = model[0].inv_freq.clone()
    model.to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].inv_freq, exact)
