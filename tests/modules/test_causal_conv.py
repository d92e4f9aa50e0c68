from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cosy_engine.modules.causal_conv import CausalConv1d, CausalFrameConv1d, FrameConv1d
from cosy_engine.modules.streaming import init_state


def test_frames_of_the_future_do_not_matter() -> None:
    conv = CausalConv1d(4, 6, 5, groups=2).double()
    x = torch.randn(2, 4, 20, dtype=torch.float64)
    expected = F.conv1d(F.pad(x, (4, 0)), conv.weight, conv.bias, groups=2)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv(x[:, :, :7]), expected[:, :, :7])


def test_chunks_equal_the_whole_and_the_state_holds_only_the_tail() -> None:
    conv = CausalConv1d(4, 6, 5).double()
    x = torch.randn(2, 4, 20, dtype=torch.float64)
    state = init_state(conv, 2, x.device, x.dtype)
    chunks = []
    for chunk in x.split([1, 2, 9, 3, 5], dim=2):
        chunks.append(conv(chunk, state))
        assert state["tail"].untyped_storage().nbytes() == 2 * 4 * 4 * 8
    torch.testing.assert_close(torch.cat(chunks, dim=2), conv(x))


def test_frames_first_is_the_same_convolution() -> None:
    conv, frames_first = CausalConv1d(4, 6, 5).double(), CausalFrameConv1d(4, 6, 5).double()
    frames_first.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 20, dtype=torch.float64)
    states = [init_state(module, 2, x.device, x.dtype) for module in (conv, frames_first)]
    for chunk in x.split([1, 2, 9, 3, 5], dim=2):
        expected, got = conv(chunk, states[0]), frames_first(chunk.transpose(1, 2), states[1])
        torch.testing.assert_close(got.transpose(1, 2), expected)
        assert torch.equal(states[1]["tail"].transpose(1, 2), states[0]["tail"])
    torch.testing.assert_close(frames_first(x.transpose(1, 2)).transpose(1, 2), conv(x))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_convolution_of_frames_is_a_product_of_matrices(kernel_size: int) -> None:
    conv, x = FrameConv1d(4, 6, kernel_size), torch.randn(2, 20, 4)
    expected = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("kind", [CausalConv1d, CausalFrameConv1d])
def test_padding_at_the_end_is_not_remembered(kind: type[CausalConv1d]) -> None:
    conv, x = kind(3, 3, 4), torch.randn(2, 3, 3)
    counts = [3, 1]
    state = init_state(conv, 2, x.device, x.dtype)
    state["next_tail"] = torch.tensor(counts)[:, None] + torch.arange(3)
    conv(x, state)
    for row, count in enumerate(counts):
        own, alone = x[row : row + 1], init_state(conv, 1, x.device, x.dtype)
        conv(own[:, :, :count] if kind is CausalConv1d else own[:, :count], alone)
        assert torch.equal(state["tail"][row : row + 1], alone["tail"])
