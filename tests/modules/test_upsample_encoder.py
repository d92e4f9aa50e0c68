from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cosy_engine.errors import ModelDirectoryError
from cosy_engine.modules.streaming import fork_state, init_state, stack_states
from cosy_engine.modules.upsample_encoder import (
    PreLookaheadLayer,
    RelPositionMultiHeadedAttention,
    UpsampleConformerEncoder,
    embed_distances,
)
from tests.modules.small_flow import small_encoder


def _embedded(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(seed))


def test_distance_embedding_by_its_formula() -> None:
    embedded = embed_distances(5, -3, 8, torch.device("cpu"))
    assert embedded.shape == (9, 8)
    for row, distance in enumerate(range(5, -4, -1)):
        for pair in range(4):
            angle = distance / 10000 ** (2 * pair / 8)
            assert embedded[row, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert embedded[row, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
def test_relative_attention_equals_its_formula_for_each_pair() -> None:
    heads, size, frames = 2, 8, 6
    attention = RelPositionMultiHeadedAttention(heads, size, 0.0)
    x = torch.randn(1, frames, size)
    q, k, v = (
        linear(x[0]).view(frames, heads, -1) for linear in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    attended = torch.zeros(frames, heads, size // heads)
    for i in range(frames):
        for head in range(heads):
            scores = torch.zeros(frames)
            for j in range(frames):
                place = attention.linear_pos(embed_distances(i - j, i - j, size, x.device))[0].view(heads, -1)[head]
                by_content = (q[i, head] + attention.pos_bias_u[head]) @ k[j, head]
                by_place = (q[i, head] + attention.pos_bias_v[head]) @ place
                scores[j] = (by_content + by_place) / math.sqrt(size // heads)
            attended[i, head] = scores.softmax(0) @ v[:, head]
    torch.testing.assert_close(attention(x, [None])[0], attention.linear_out(attended.flatten(1)))


@torch.no_grad()
def test_padding_changes_nothing_but_the_look_ahead() -> None:
    """Rows of padding are zeros, and the look-ahead of the last tokens sees them as such."""
    encoder = small_encoder()
    xs = _embedded(40, batch=2)
    xs[1, 30:] = 0
    together, mask = encoder(xs, torch.tensor([40, 30]))
    assert mask.shape == (2, 1, 80)
    assert mask.sum(dim=2).tolist() == [[80], [60]]
    torch.testing.assert_close(together[:1], encoder(xs[:1])[0], atol=1e-5, rtol=1e-5)
    alone, _ = encoder(xs[1:, :30], context=torch.zeros(1, 3, 12))
    torch.testing.assert_close(together[1:, :60], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_look_ahead_reaches_as_far_as_it_says() -> None:
    layer = PreLookaheadLayer(4, 6, pre_lookahead_len=2)
    xs = torch.randn(1, 10, 4)
    expected = layer(xs)
    torch.testing.assert_close(layer(xs[:, :6], xs[:, 6:8]), expected[:, :6])
    changed = xs.clone()
    changed[:, 5] += 1
    differs = (layer(changed) - expected).abs().amax(dim=2)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@torch.no_grad()
def test_streams_of_different_pasts_share_a_batch() -> None:
    encoder, fed = small_encoder(), (5, 20)
    states = [init_state(encoder, 1, torch.device("cpu"), torch.float32) for _ in fed]
    for seed, (tokens, state) in enumerate(zip(fed, states, strict=True)):
        encoder(_embedded(tokens, seed=seed), streaming=True, state=state)
    alone = [fork_state(state) for state in states]
    together = stack_states(states)
    for seed in (2, 3):
        xs, context = _embedded(30, 2, seed), _embedded(3, 2, seed + 10)
        features, _ = encoder(xs, context=context, streaming=True, state=together)
        for row, state in enumerate(alone):
            own = slice(row, row + 1)
            expected, _ = encoder(xs[own], context=context[own], streaming=True, state=state)
            torch.testing.assert_close(features[own], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_result_does_not_depend_on_earlier_calls() -> None:
    encoder = small_encoder()
    short = encoder(_embedded(30))[0]
    encoder(_embedded(700))
    assert torch.equal(encoder(_embedded(30))[0], short)


@torch.no_grad()
def test_distances_are_projected_once() -> None:
    encoder = small_encoder()
    calls = []
    for layer in [*encoder.encoders, *encoder.up_encoders]:
        layer.self_attn.linear_pos.register_forward_hook(lambda *_: calls.append(1))
    encoder(_embedded(100))
    assert calls
    calls.clear()
    encoder(_embedded(110))
    assert not calls


def test_distances_are_projected_again_with_other_weights() -> None:
    encoder, other = small_encoder(), small_encoder()
    xs = _embedded(30)
    with torch.no_grad():
        encoder(xs)
    encoder.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(encoder(xs)[0], other(xs)[0])

    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1)
    encoder(xs)[0][..., 0].square().mean().backward()
    optimizer.step()
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(encoder(xs)[0], other(xs)[0])

    encoder.double(), other.double()
    with torch.no_grad():
        assert torch.equal(encoder(xs.double())[0], other(xs.double())[0])


def test_an_encoder_that_neither_model_has_is_refused() -> None:
    with pytest.raises(ModelDirectoryError, match="macaron_style=True"):
        UpsampleConformerEncoder(12, 16, macaron_style=True)
