from __future__ import annotations

import torch
import torch.nn.functional as F

from cosy_engine.modules.causal_conv import CausalConv1d
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
