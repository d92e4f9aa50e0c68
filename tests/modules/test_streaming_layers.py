"""Fed in chunks, the layers give what torch's own whole-sequence functions give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from cosy_engine.modules.streaming import State, stack_states, state_bytes
from cosy_engine.modules.streaming_layers import (
    STFT,
    InverseSTFT,
    StreamingConv1d,
    StreamingConvTranspose1d,
    fold_weight_norm,
)


class Inverse(InverseSTFT):
    """Takes magnitude and phase as one tensor."""

    def forward(self, x: Tensor, state: State, *, finalize: bool) -> Tensor:
        magnitude, phase = x.chunk(2, dim=1)
        return super().forward(magnitude, phase, state, finalize=finalize)


CHUNKS = [[1] * 40, [7, 0, 30, 3], [39, 1], [40]]


def feed(layer: Callable, x: Tensor, chunks: list[int]) -> Tensor:
    """Outputs of all chunks together; checks `ready` on the way."""
    state: State = {}
    outputs, fed = [], 0
    for chunk in chunks:
        fed += chunk
        finalize = fed == x.shape[-1]
        outputs.append(layer(x[..., fed - chunk : fed], state, finalize=finalize))
        if not finalize:
            assert sum(output.shape[-1] for output in outputs) == layer.ready(fed)
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation", "upsample", "left", "right"),
    [
        (1, 1, 1, 1, 0, 0),
        (7, 1, 3, 1, 9, 9),
        (11, 1, 5, 1, 50, 0),
        (5, 1, 1, 1, 0, 4),
        (30, 15, 1, 1, 7, 7),
        (6, 3, 1, 1, 2, 0),
        (16, 1, 1, 8, 15, 0),
    ],
)
def test_convolution(
    kernel_size: int, stride: int, dilation: int, upsample: int, left: int, right: int, chunks
) -> None:
    torch.manual_seed(0)
    conv = StreamingConv1d(
        3, 4, kernel_size, left=left, right=right, stride=stride, dilation=dilation, upsample=upsample
    )
    x = torch.randn(2, 3, 40)
    padded = F.pad(F.interpolate(x, scale_factor=upsample), (left, right))
    want = F.conv1d(padded, conv.weight, conv.bias, stride, dilation=dilation)
    torch.testing.assert_close(feed(conv, x, chunks), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(16, 8), (11, 5), (7, 3)])
def test_transposed_convolution(kernel_size: int, stride: int, chunks: list[int]) -> None:
    torch.manual_seed(0)
    conv = StreamingConvTranspose1d(3, 2, kernel_size, stride)
    x = torch.randn(1, 3, 40)
    want = F.conv_transpose1d(x, conv.weight, conv.bias, stride, padding=(kernel_size - stride) // 2)
    assert want.shape[-1] == 40 * stride
    torch.testing.assert_close(feed(conv, x, chunks), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_stft_and_its_inverse(chunks: list[int]) -> None:
    torch.manual_seed(0)
    window = torch.hann_window(16)
    x = torch.randn(2, 40)
    spectrum = torch.stft(x, 16, 4, window=window, return_complex=True)
    torch.testing.assert_close(feed(STFT(16, 4), x, chunks), torch.cat([spectrum.real, spectrum.imag], dim=1))

    polar = torch.cat([torch.rand(2, 9, 40), torch.randn(2, 9, 40)], dim=1)
    want = torch.istft(torch.polar(*polar.chunk(2, dim=1)), 16, 4, window=window)
    torch.testing.assert_close(feed(Inverse(16, 4), polar, chunks), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        StreamingConv1d(3, 4, 7, left=9, right=9, dilation=3),
        StreamingConv1d(3, 4, 6, left=3, right=3, stride=3),
        StreamingConv1d(3, 4, 16, left=15, right=0, upsample=8),
        StreamingConvTranspose1d(3, 4, 11, 5),
        STFT(16, 4),
        Inverse(16, 4),
    ],
)
def test_rows_may_end_within_a_call(layer: Callable) -> None:
    """Up to its end each row gets what it gets alone when it is finalized there."""
    start, rest, ends = 48, 72, [0, 1, 9, 30, 1000]
    shape = {STFT: (5,), Inverse: (5, 18)}.get(type(layer), (5, 3))
    x = torch.randn(*shape, start + rest, generator=torch.Generator().manual_seed(0))
    states: list[State] = [{} for _ in ends]
    for row, state in zip(x.split(1), states, strict=True):
        layer(row[..., :start], state, finalize=False)
    state = stack_states(states)
    state["end"] = torch.tensor(ends)
    got = layer(x[..., start:], state, finalize=False)
    for row, own, end, values in zip(x.split(1), states, ends, got, strict=True):
        want = layer(row[..., start : start + end], own, finalize=end <= rest)[0]
        torch.testing.assert_close(values[..., : want.shape[-1]], want, atol=1e-5, rtol=1e-5)
        assert want.shape[-1] <= values.shape[-1]
    assert "end" not in state


def test_the_state_keeps_no_more_than_it_says() -> None:
    state: State = {}
    StreamingConv1d(3, 4, 7, left=3, right=3)(torch.randn(1, 3, 10_000), state, finalize=False)
    assert state_bytes(state) == 3 * 6 * 4
    assert state["tail"].untyped_storage().nbytes() == 3 * 6 * 4


def test_folding_weight_norm_keeps_the_output() -> None:
    torch.manual_seed(0)
    conv = weight_norm(StreamingConv1d(3, 4, 7, left=3, right=3))
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    x = torch.randn(1, 3, 10)
    before = conv(x)
    fold_weight_norm(conv)
    assert sorted(conv.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(conv(x), before)
