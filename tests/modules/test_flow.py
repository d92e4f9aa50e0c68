from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from cosy_engine.errors import InvalidRequestError
from cosy_engine.modules.dit import DiT
from cosy_engine.modules.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.streaming import State, flatten_state, fork_state, init_state, state_bytes
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder
from tests.feeds import mask_as_fed
from tests.modules.small_flow import CFM_PARAMS, small_flow

VERSIONS = ["cosyvoice2", "cosyvoice3"]
STEPS = 2


class Speech:
    """A prompt and the tokens to speak after it, in float64 so that only real differences show."""

    def __init__(self, prompt_tokens: int, tokens: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 40, (1, prompt_tokens + tokens), generator=generator)
        self.prompt_tokens = prompt_tokens
        self.prompt_feat = torch.randn(1, 2 * prompt_tokens, 80, generator=generator, dtype=torch.float64)
        self.embedding = torch.randn(1, 192, generator=generator, dtype=torch.float64)

    @property
    def total(self) -> int:
        return self.tokens.shape[1]

    def whole(self, flow: nn.Module, end: int | None = None, **options: bool) -> Tensor:
        token = self.tokens[:, self.prompt_tokens : end]
        prompt_token = self.tokens[:, : self.prompt_tokens]
        return flow.inference(token, prompt_token, self.prompt_feat, self.embedding, n_timesteps=STEPS, **options)

    def feed(self, flow: nn.Module, state: State, start: int, end: int) -> Tensor:
        """Mel of the tokens start ... end-1 of prompt and speech together."""
        finalize = end == self.total
        cond = torch.zeros(1, 80, 2 * self.total, dtype=torch.float64)
        cond[:, :, : 2 * self.prompt_tokens] = self.prompt_feat.transpose(1, 2)
        return flow.forward_chunk(
            self.tokens[:, start : end if finalize else end + 3],
            cond[:, :, 2 * start : 2 * end],
            flow.project_speaker(self.embedding),
            state,
            finalize=finalize,
            n_timesteps=STEPS,
        )

    def stream(self, flow: nn.Module, ends: Iterable[int]) -> Tensor:
        """Mel of everything after the prompt, fed in chunks that end at `ends`."""
        state = init_state(flow, 1, self.embedding.device, self.embedding.dtype)
        starts = [0, *ends][:-1]
        chunks = [self.feed(flow, state, start, end) for start, end in zip(starts, ends, strict=True)]
        return torch.cat(chunks, dim=2)[:, :, 2 * self.prompt_tokens :]


def _flow(version: str) -> nn.Module:
    return small_flow(version).double()


@pytest.mark.parametrize("hop", [25, 50, 100])
@pytest.mark.parametrize("prompt_tokens", [1, 31, 75])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_chunks_that_end_with_the_masks_chunks_equal_one_call(version: str, prompt_tokens: int, hop: int) -> None:
    flow, speech = _flow(version), Speech(prompt_tokens, 118)
    first = -(-(prompt_tokens + hop) // 25) * 25
    ends = [*range(first, speech.total - 3, hop), speech.total]
    whole = speech.whole(flow, streaming=True, finalize=True)
    assert whole.shape == (1, 80, 2 * 118)
    torch.testing.assert_close(speech.stream(flow, ends), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("hops", [(7,), (40, 11, 3), (1, 60), (100, 10)])
@pytest.mark.parametrize("prompt_tokens", [5, 40])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_chunks_that_end_anywhere_equal_one_call_with_their_masks(
    monkeypatch: pytest.MonkeyPatch, version: str, prompt_tokens: int, hops: tuple[int, ...]
) -> None:
    flow, speech = _flow(version), Speech(prompt_tokens, 83)
    ends, end = [], prompt_tokens
    while end < speech.total:
        end = min(speech.total, end + hops[len(ends) % len(hops)])
        ends.append(end if speech.total - end > 3 else speech.total)
        end = ends[-1]
    streamed = speech.stream(flow, ends)

    mask_as_fed(monkeypatch, ends)
    whole = speech.whole(flow, streaming=True, finalize=True)
    torch.testing.assert_close(streamed, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_without_finalize_the_last_three_tokens_are_only_looked_at(version: str) -> None:
    flow, speech = _flow(version), Speech(30, 70)
    whole = speech.whole(flow, streaming=True, finalize=True)
    begun = speech.whole(flow, end=78, streaming=True, finalize=False)
    assert begun.shape[2] == 2 * (75 - 30)
    torch.testing.assert_close(begun, whole[:, :, : 2 * 45], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(speech.whole(flow, streaming=False, finalize=True), whole)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_two_requests_go_on_from_one_voice(version: str) -> None:
    flow, one, other = _flow(version), Speech(60, 50, seed=1), Speech(60, 50, seed=1)
    other.tokens = other.tokens.clone()
    other.tokens[:, 55:] = 39 - other.tokens[:, 55:]
    voice = init_state(flow, 1, torch.device("cpu"), torch.float64)
    one.feed(flow, voice, 0, 50)
    kept = {name: tensor.clone() for name, tensor in flatten_state(voice).items()}
    for speech in (one, other):
        mel = speech.feed(flow, fork_state(voice), 50, 110)[:, :, 20:]
        whole = speech.whole(flow, streaming=True, finalize=True)
        torch.testing.assert_close(mel, whole, atol=1e-9, rtol=1e-9)
    for name, tensor in flatten_state(voice).items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_state_holds_no_more_memory_than_it_says(version: str) -> None:
    flow, speech = _flow(version), Speech(25, 100)
    state = init_state(flow, 1, torch.device("cpu"), torch.float64)
    for start in (0, 25, 50):
        speech.feed(flow, state, start, start + 25)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in flatten_state(state).items()
        if name != "decoder.offset"  # a number
    }
    assert sum(storages.values()) == state_bytes(state)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_equal_lengths_can_share_a_batch(version: str) -> None:
    flow, speeches = _flow(version), [Speech(0, 40, seed) for seed in (1, 2)]
    token = torch.cat([speech.tokens for speech in speeches])
    spks = flow.project_speaker(torch.cat([speech.embedding for speech in speeches]))
    cond = torch.zeros(2, 80, 80, dtype=torch.float64)
    mel = flow.forward_chunk(token, cond, spks, None, finalize=True, n_timesteps=STEPS)
    for row, speech in zip(mel, speeches, strict=True):
        torch.testing.assert_close(row[None], speech.whole(flow, streaming=True, finalize=True), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_chunk_without_a_token_of_its_own_is_refused(version: str) -> None:
    flow = small_flow(version)
    state = init_state(flow, 1, torch.device("cpu"), torch.float32)
    token, cond, spks = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 80, 0), torch.zeros(1, 80)
    with pytest.raises(InvalidRequestError):
        flow.forward_chunk(token, cond, spks, state, finalize=False)
    with pytest.raises(InvalidRequestError):
        flow.forward_chunk(token[:, :0], cond, spks, state, finalize=True)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_the_length_of_a_speaker_embedding_does_not_matter(version: str) -> None:
    flow, embedding = small_flow(version), torch.randn(1, 192)
    torch.testing.assert_close(flow.project_speaker(5 * embedding), flow.project_speaker(embedding))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_training_loss_reaches_every_weight_and_falls(version: str, streaming: bool) -> None:
    torch.manual_seed(0)
    flow = small_flow(version).train()
    batch = {
        "token": torch.randint(0, 40, (4, 40)),
        "token_len": torch.tensor([40, 33, 40, 20]),
        "feat": torch.full((4, 80, 80), 2.0),
        "embedding": torch.randn(4, 192),
    }
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = flow(**batch, streaming=streaming)
        loss.backward()
        if not losses:
            assert [name for name, weight in flow.named_parameters() if weight.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("version", VERSIONS)
def test_padding_has_no_part_in_the_training_loss(version: str) -> None:
    flow = small_flow(version)
    batch = {
        "token": torch.randint(0, 40, (2, 30)),
        "token_len": torch.tensor([30, 20]),
        "feat": torch.randn(2, 60, 80),
        "embedding": torch.randn(2, 192),
    }
    torch.manual_seed(1)
    expected = flow(**batch)
    batch["feat"][1, 40:] = 1000
    batch["token"][1, 20:] = 39
    torch.manual_seed(1)
    torch.testing.assert_close(flow(**batch), expected)


def _parameters(flow: nn.Module) -> float:
    """In millions."""
    return sum(weight.numel() for weight in flow.parameters()) / 1e6


def test_cosyvoice2_in_its_published_size() -> None:
    with torch.device("meta"):
        encoder = UpsampleConformerEncoder(512, 512, attention_heads=8, linear_units=2048, num_blocks=6)
        estimator = CausalConditionalDecoder(320, 80, [256], 0.0, 64, n_blocks=4, num_mid_blocks=12, num_heads=8)
        decoder = CausalConditionalCFM(240, CFM_PARAMS, estimator=estimator)
        flow = CausalMaskedDiffWithXvec(encoder=encoder, decoder=decoder)
    assert _parameters(flow) == pytest.approx(112.5, abs=0.05)
    assert (flow.chunk_size, flow.pre_lookahead_len, flow.token_mel_ratio, flow.vocab_size) == (25, 3, 2, 6561)


def test_cosyvoice3_in_its_published_size() -> None:
    with torch.device("meta"):
        estimator = DiT(dim=1024, depth=22, heads=16, dim_head=64, ff_mult=2)
        decoder = CausalConditionalCFM(240, CFM_PARAMS, estimator=estimator)
        flow = CausalMaskedDiffWithDiT(pre_lookahead_layer=PreLookaheadLayer(80, 1024), decoder=decoder)
    assert _parameters(flow) == pytest.approx(332.3, abs=0.05)
    assert (flow.chunk_size, flow.pre_lookahead_len, flow.token_mel_ratio, flow.vocab_size) == (25, 3, 2, 6561)
