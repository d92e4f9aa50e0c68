"""The static shapes are tested without capturing them: on a GPU the same function is captured as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.streaming import State, fork_state, init_state, move_state, state_bytes
from cosy_engine.token2wav import static_encoder
from cosy_engine.token2wav.static_encoder import StaticEncoder, use_static_encoder
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.work import Encode
from tests.modules.small_flow import small_flow
from tests.token2wav.test_session import random_prompt, random_tokens, run

CPU = torch.device("cpu")
TOLERANCE = 1e-5
SOUND_TOLERANCE = 1e-3
POSITIONS = 8 * 1024


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def plain() -> nn.Module:
    return small_flow("cosyvoice2")


@pytest.fixture
def static() -> nn.Module:
    """The same flow, its encoder at static shapes."""
    flow = small_flow("cosyvoice2")
    flow.encoder = StaticEncoder(flow.encoder, positions=POSITIONS, graphs=False)
    return flow


@dataclass
class Stream:
    """Random tokens that both flows are fed alike."""

    seed: int
    states: dict[nn.Module, State] = field(default_factory=dict)
    fed: int = 0

    def work(self, flow: nn.Module, count: int, *, finalize: bool = False) -> Encode:
        if flow not in self.states:
            self.states[flow] = init_state(flow, 1, CPU, torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        token = torch.randint(0, 40, (1, self.fed + count + (0 if finalize else 3)), generator=generator)
        return Encode(flow, token[:, self.fed :].int(), self.states[flow], finalize=finalize)

    def fork(self, seed: int) -> Stream:
        return Stream(seed, {flow: fork_state(state) for flow, state in self.states.items()}, self.fed)


def feed(
    plain: nn.Module, static: nn.Module, streams: Sequence[Stream], counts: Sequence[int], last: Sequence[int] = ()
) -> None:
    """The next tokens of some streams, in one batch, and of each alone; `last`: which of them end."""

    def works(flow: nn.Module) -> list[Encode]:
        pairs = enumerate(zip(streams, counts, strict=True))
        return [stream.work(flow, count, finalize=index in last) for index, (stream, count) in pairs]

    alone = works(plain)
    for work in alone:
        Encode.run([work])
    together = works(static)
    Encode.run(together)
    for work, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(work.mu, expected.mu, atol=TOLERANCE, rtol=0)
    for stream, count in zip(streams, counts, strict=True):
        stream.fed += count


@pytest.mark.parametrize("prompt", [0, 1, 47, 230])
def test_a_stream_alone_is_as_without(plain: nn.Module, static: nn.Module, prompt: int) -> None:
    stream = Stream(prompt)
    for count in (prompt, 18, 5, 5, 10, 25, 50, 100, 1, 26):
        if count:
            feed(plain, static, [stream], [count])
    feed(plain, static, [stream], [7], last=[0])


def test_streams_of_other_pasts_and_lengths_share_a_batch(plain: nn.Module, static: nn.Module) -> None:
    streams = [Stream(seed) for seed in range(5)]
    for stream, prompt in zip(streams[1:], (3, 60, 141, 200), strict=True):
        feed(plain, static, [stream], [prompt])
    feed(plain, static, streams, [18, 5, 25, 1, 10])
    feed(plain, static, streams, [25, 50, 100, 5, 10])
    feed(plain, static, streams, [13, 2, 25, 40, 1], last=[1, 3, 4])


@pytest.mark.parametrize("count", range(1, 61))
def test_the_last_chunk_has_any_length(plain: nn.Module, static: nn.Module, count: int) -> None:
    ending, going_on = Stream(0), Stream(1)
    feed(plain, static, [ending, going_on], [30, 8])
    feed(plain, static, [ending, going_on], [count, 25], last=[0])
    feed(plain, static, [going_on], [5])


def test_streams_of_one_voice_go_on_independently(plain: nn.Module, static: nn.Module) -> None:
    voice = Stream(0)
    feed(plain, static, [voice], [200])
    feed(plain, static, [voice], [47])  # there is room now
    size = state_bytes(voice.states[static]["encoder"])
    forks = [voice.fork(seed) for seed in (1, 2)]
    for counts in ((18, 18), (5, 10), (25, 25)):
        feed(plain, static, forks, counts)
    feed(plain, static, [voice], [25])
    feed(plain, static, [*forks, voice.fork(3)], [25, 50, 5])
    assert state_bytes(voice.states[static]["encoder"]) == size


def test_a_voice_goes_on_after_it_was_moved(plain: nn.Module, static: nn.Module) -> None:
    stream = Stream(0)
    feed(plain, static, [stream], [60])
    moved = move_state(stream.states[static], CPU)
    assert state_bytes(moved["encoder"]) <= state_bytes(stream.states[static]["encoder"])
    assert state_bytes(move_state(moved, torch.device("meta"))["encoder"]) == state_bytes(moved["encoder"])
    stream.states[static] = moved
    feed(plain, static, [stream], [25])


def test_chunks_that_begin_without_mu_are_encoded_too(plain: nn.Module, static: nn.Module) -> None:
    """As a prompt is."""
    prompt = torch.randint(0, 40, (1, 203), generator=torch.Generator().manual_seed(0))
    encoded = []
    for flow in (plain, static):
        state = init_state(flow, 1, CPU, torch.float32)
        encoded.append([flow.encode_chunk(token, state, finalize=False) for token in (prompt, prompt[:, :28])])
    torch.testing.assert_close(*encoded, atol=TOLERANCE, rtol=0)


def test_whole_utterances_are_the_encoders_own(plain: nn.Module, static: nn.Module) -> None:
    token = torch.randint(0, 40, (1, 70), generator=torch.Generator().manual_seed(0))
    for streaming in (False, True):
        ours, theirs = (flow.encode_chunk(token, None, streaming=streaming, finalize=True) for flow in (static, plain))
        assert torch.equal(ours, theirs)


def test_a_batch_with_no_room_for_it_is_run_in_parts(
    plain: nn.Module, static: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_encoder, "_WIDTHS", (64, 128))
    static.encoder = StaticEncoder(static.encoder.encoder, positions=300, graphs=False)
    streams = [Stream(seed) for seed in range(5)]
    feed(plain, static, streams[:3], [25, 40, 9])
    feed(plain, static, streams[4:], [110])
    for counts in ([18, 25, 5, 13, 1], [25, 50, 25, 5, 60]):
        feed(plain, static, streams, counts, last=[3] if counts[0] == 25 else ())
    assert {width for _, _, width in static.encoder._steps} == {64, 128}
    assert all(rows * width <= 300 for rows, _, width in static.encoder._steps)


def test_a_batch_larger_than_the_shapes_is_run_in_parts(
    plain: nn.Module, static: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(plain, static, [Stream(seed) for seed in range(35)], [25 - seed % 5 for seed in range(35)])
    assert {rows for rows, *_ in static.encoder._steps} == {32}


def test_a_chunk_longer_than_the_shapes_is_served(plain: nn.Module, static: nn.Module) -> None:
    streams = [Stream(0), Stream(1)]
    feed(plain, static, streams, [230, 18])
    feed(plain, static, streams, [25, 25], last=[1])
    assert [tokens for _, tokens, _ in static.encoder._steps] == [25]


def test_what_is_captured_before_its_first_input_is_finite(static: nn.Module) -> None:
    """What a captured run leaves in the shared buffer stays there, and a mask does not hide what is not a number."""
    encoder, results = static.encoder, []
    encoder._capture = lambda run, device: results.extend(run()) or run
    encoder.warm_up(2)
    usual = {(rows, tokens, width) for rows in (1, 2) for tokens in (25, 50, 100) for width in (256, 512, 1024)}
    assert set(encoder._steps) == usual | {(rows, 200, width) for rows in (1, 2) for width in (256, 512)}
    assert all(result.isfinite().all() for result in results)
    assert encoder._keys_values.isfinite().all()


def test_few_shapes_serve_a_stream(plain: nn.Module, static: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many graphs are captured; each costs time and memory."""
    static.encoder.warm_up(1)
    captured: list[torch.device] = []
    monkeypatch.setattr(static.encoder, "_capture", lambda run, device: captured.append(device) or run)
    stream = Stream(0)
    for count in (200, 47, 18, 5, 5, 10, 25, 50, 50, 11):
        feed(plain, static, [stream], [count])
    assert captured == []


def test_what_a_graph_reads_stays_where_it_is(static: nn.Module) -> None:
    """A longer stream projects more distances; those of the shapes before are kept."""
    encoder = static.encoder
    encoder._step(1, 25, 256)
    buffers, _ = encoder._steps[1, 25, 256]
    addresses = [distances.data_ptr() for distances in buffers.distances]
    before = [distances.clone() for distances in buffers.distances]
    encoder._step(1, 25, 2048)
    assert addresses == [distances.data_ptr() for distances in buffers.distances]
    assert all(map(torch.equal, before, buffers.distances))


def test_streams_sound_as_without(model: CosyVoiceModel) -> None:
    plain = getattr(model.flow, "encoder", None)
    if plain is None:
        pytest.skip("CosyVoice3 has no such encoder")
    prompt, tokens = random_prompt(77), random_tokens(120)

    def sound() -> Tensor:
        session = Token2Wav(model.flow, model.hift).session(prompt, HopSettings(), stream=True, seed=7)
        return torch.cat(run(session, tokens))

    expected = sound()
    model.flow.encoder = StaticEncoder(plain, positions=POSITIONS, graphs=False)
    try:
        torch.testing.assert_close(sound(), expected, atol=SOUND_TOLERANCE, rtol=0)
    finally:
        model.flow.encoder = plain


def test_cosyvoice3_is_left_as_it_is() -> None:
    flow = small_flow("cosyvoice3")
    modules = list(flow.modules())
    use_static_encoder(flow, 32)
    assert list(flow.modules()) == modules
