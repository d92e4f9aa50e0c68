from __future__ import annotations

import pytest
import torch

from cosy_engine.token2wav.speed import StreamingSpeed, change_speed

SPEEDS = [0.5, 0.8, 1.0, 1.3, 2.0]


@pytest.mark.parametrize("speed", SPEEDS)
def test_length_follows_the_speed(speed: float) -> None:
    assert change_speed(torch.randn(1, 80, 101), speed).shape == (1, 80, int(101 / speed))


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("chunks", [[101], [50, 51], [1] * 101, [0, 88, 3, 10, 0]])
def test_a_stream_of_chunks_equals_one_chunk(speed: float, chunks: list[int]) -> None:
    mel = torch.randn(1, 80, 101)
    stream = StreamingSpeed(speed)
    parts = [stream.push(part, finalize=False) for part in mel.split(chunks, dim=2)]
    parts.append(stream.push(mel[:, :, :0], finalize=True))
    whole = StreamingSpeed(speed).push(mel, finalize=True)
    assert torch.cat(parts, dim=2).shape == (1, 80, int(101 / speed))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("speed", SPEEDS)
def test_streaming_stretches_as_the_whole_does(speed: float) -> None:
    """Rounding the length moves a frame by less than one frame of the output."""
    ramp = torch.arange(100.0).expand(1, 80, 100)
    streamed = StreamingSpeed(speed).push(ramp, finalize=True)
    whole = change_speed(ramp, speed)
    assert streamed.shape == whole.shape
    assert (streamed - whole).abs().max() < speed
