"""The vocoders: streaming equals the whole, states are independent, public sizes and shapes."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor

from cosy_engine.modules.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor
from cosy_engine.modules.hift import CausalHiFTGenerator, HiFTGenerator
from cosy_engine.modules.streaming import State, fork_state
from cosy_engine.modules.streaming_layers import fold_weight_norm

PREDICTORS = {HiFTGenerator: ConvRNNF0Predictor, CausalHiFTGenerator: CausalConvRNNF0Predictor}
both = pytest.mark.parametrize("vocoder", list(PREDICTORS))


PITCH = {"mixed": (30.0, 60.0), "voiced": (250.0, 40.0), "unvoiced": (0.0, 1.0)}  # mean and deviation in Hz


def make_hift(vocoder: type[HiFTGenerator], pitch: str = "mixed") -> HiFTGenerator:
    """Random weights; what the pitch predictor says has the mean and deviation asked for, and then loses its sign."""
    torch.manual_seed(0)
    predictor = PREDICTORS[vocoder](cond_channels=8)
    model = vocoder(base_channels=16, f0_predictor=predictor).eval()
    with torch.no_grad():
        mean, deviation = PITCH[pitch]
        predictor.classifier.bias.fill_(1e6)  # no sign is lost while this is measured
        found = predictor(make_mel(200).double())
        predictor.classifier.weight.mul_(deviation / found.std())
        predictor.classifier.bias.fill_(mean - (float(found.mean()) - 1e6) * deviation / float(found.std()))
    return model.requires_grad_(False)


def make_mel(frames: int) -> Tensor:
    return torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(1))


def vocode_whole(model: HiFTGenerator, mel: Tensor, seed: int = 0) -> Tensor:
    return model.forward_chunk(mel, model.init_state(1, "cpu", seed=seed), finalize=True)


def vocode_chunks(model: HiFTGenerator, mel: Tensor, pattern: list[int]) -> list[Tensor]:
    """Feed chunks of these lengths over and over; the last one is cut to what is left."""
    state, fed, chunks = model.init_state(1, "cpu"), 0, []
    for length in cycle(pattern):
        chunk = mel[..., fed : fed + length]
        fed += chunk.shape[-1]
        chunks.append(model.forward_chunk(chunk, state, finalize=fed == mel.shape[-1]))
        if fed == mel.shape[-1]:
            return chunks
        assert sum(chunk.shape[-1] for chunk in chunks) == model.samples_ready(fed)


@both
@pytest.mark.parametrize(
    ("pitch", "frames", "pattern"),
    [
        ("mixed", 30, [1]),
        ("mixed", 100, [3, 0, 11, 1]),
        ("mixed", 100, [99, 1]),
        ("mixed", 600, [25, 50, 100]),
        ("voiced", 600, [50]),
        ("unvoiced", 100, [50]),
    ],
)
def test_any_chunking_gives_the_whole(
    vocoder: type[HiFTGenerator], pitch: str, frames: int, pattern: list[int]
) -> None:
    model, mel = make_hift(vocoder, pitch), make_mel(frames)
    whole = vocode_whole(model, mel)
    assert whole.shape == (1, frames * 480)
    assert float(whole.std()) > 0.01
    torch.testing.assert_close(torch.cat(vocode_chunks(model, mel, pattern), dim=-1), whole, atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize(("pitch", "least", "most"), [("mixed", 0.7, 0.95), ("voiced", 1, 1), ("unvoiced", 0, 0)])
def test_the_test_models_are_voiced_as_they_say(
    vocoder: type[HiFTGenerator], pitch: str, least: float, most: float
) -> None:
    voiced = (make_hift(vocoder, pitch).f0_predictor(make_mel(200)) > 10).float().mean()
    assert least <= float(voiced) <= most


@both
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_input_shorter_than_the_lookahead(vocoder: type[HiFTGenerator], frames: int) -> None:
    model, mel = make_hift(vocoder), make_mel(frames)
    whole = vocode_whole(model, mel)
    assert whole.shape == (1, frames * 480)
    torch.testing.assert_close(torch.cat(vocode_chunks(model, mel, [1]), dim=-1), whole, atol=1e-5, rtol=0)


@both
def test_the_end_may_come_without_frames(vocoder: type[HiFTGenerator]) -> None:
    model, mel = make_hift(vocoder), make_mel(30)
    state = model.init_state(1, "cpu")
    speech = [model.forward_chunk(mel, state, finalize=False), model.forward_chunk(mel[..., :0], state, finalize=True)]
    torch.testing.assert_close(torch.cat(speech, dim=-1), vocode_whole(model, mel), atol=1e-5, rtol=0)
    assert model.forward_chunk(mel[..., :0], model.init_state(1, "cpu"), finalize=True).shape == (1, 0)


@pytest.mark.parametrize(
    ("vocoder", "lookahead", "after_50"), [(HiFTGenerator, 20, 14520), (CausalHiFTGenerator, 5, 22076)]
)
def test_how_much_is_held_back(vocoder: type[HiFTGenerator], lookahead: int, after_50: int) -> None:
    """Nothing that is out may depend on frames to come, and what is held back does."""
    model, mel = make_hift(vocoder).double(), make_mel(90).double()
    assert model.lookahead_frames == lookahead
    assert vocode_chunks(model, mel, [50])[0].shape[-1] == after_50
    changed = mel.clone()
    changed[..., 50] += 1
    differs = (vocode_whole(model, mel) != vocode_whole(model, changed))[0]
    assert after_50 <= int(differs.nonzero()[0]) < after_50 + 240


@both
def test_two_streams_do_not_influence_each_other(vocoder: type[HiFTGenerator]) -> None:
    model = make_hift(vocoder)
    mels = [make_mel(60), make_mel(60).flip(-1)]
    alone = [torch.cat(vocode_chunks(model, mel, [20]), dim=-1) for mel in mels]
    states = [model.init_state(1, "cpu") for _ in mels]
    together: list[list[Tensor]] = [[], []]
    for start in (0, 20, 40):
        for mel, state, chunks in zip(mels, states, together, strict=True):
            chunks.append(model.forward_chunk(mel[..., start : start + 20], state, finalize=start == 40))
    for chunks, want in zip(together, alone, strict=True):
        assert torch.equal(torch.cat(chunks, dim=-1), want)


@both
def test_a_forked_state_goes_on_by_itself(vocoder: type[HiFTGenerator]) -> None:
    model, mel = make_hift(vocoder), make_mel(60)
    state: State = model.init_state(1, "cpu")
    first = model.forward_chunk(mel[..., :30], state, finalize=False)
    fork = fork_state(state)
    model.forward_chunk(mel[..., :30], state, finalize=True)
    rest = model.forward_chunk(mel[..., 30:], fork, finalize=True)
    torch.testing.assert_close(torch.cat([first, rest], dim=-1), vocode_whole(model, mel), atol=1e-5, rtol=0)


def test_the_seed_chooses_the_noise_of_cosyvoice2_only() -> None:
    mel = make_mel(20)
    model = make_hift(HiFTGenerator, pitch="unvoiced")
    assert torch.equal(vocode_whole(model, mel, seed=5), vocode_whole(model, mel, seed=5))
    assert not torch.equal(vocode_whole(model, mel, seed=5), vocode_whole(model, mel, seed=6))
    causal = make_hift(CausalHiFTGenerator, pitch="unvoiced")
    assert torch.equal(vocode_whole(causal, mel, seed=5), vocode_whole(causal, mel, seed=6))


@both
def test_the_global_generator_is_not_used(vocoder: type[HiFTGenerator]) -> None:
    model, mel = make_hift(vocoder), make_mel(20)
    before = torch.get_rng_state()
    speech = vocode_whole(model, mel)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(vocode_whole(model, mel), speech)


@both
def test_inference_is_the_same_computation(vocoder: type[HiFTGenerator]) -> None:
    model, mel = make_hift(vocoder), make_mel(30)
    speech, source = model.inference(mel)
    assert source.shape == (1, 1, 30 * 480)
    assert torch.equal(speech, vocode_whole(model, mel))
    assert torch.equal(speech, model.decode(mel, source))
    silent = model.inference(mel, noise=torch.zeros(1, 30 * 480, 9))[0]
    assert not torch.equal(silent, speech)


def test_cached_source_replaces_the_start() -> None:
    model, mel = make_hift(HiFTGenerator), make_mel(20)
    cache = torch.randn(1, 1, 3840)
    _, plain = model.inference(mel)
    speech, source = model.inference(mel, cache_source=cache)
    assert torch.equal(source, torch.cat([cache, plain[..., 3840:]], dim=-1))
    assert torch.equal(speech, model.decode(mel, source))


def test_causal_prefixes_are_final() -> None:
    model, mel = make_hift(CausalHiFTGenerator), make_mel(40)
    whole, whole_source = model.inference(mel)
    speech, source = model.inference(mel[..., :25], finalize=False)
    assert speech.shape == (1, 17 * 480) and source.shape == (1, 1, 22 * 480)
    torch.testing.assert_close(speech, whole[:, : 17 * 480], atol=1e-5, rtol=0)
    torch.testing.assert_close(source, whole_source[..., : 22 * 480], atol=1e-5, rtol=0)
    assert model.inference(mel[..., :8], finalize=False)[0].shape == (1, 0)


@pytest.mark.parametrize(("vocoder", "parameters"), [(HiFTGenerator, 20_821_295), (CausalHiFTGenerator, 20_779_887)])
def test_published_size(vocoder: type[HiFTGenerator], parameters: int) -> None:
    with torch.device("meta"):
        model = vocoder(f0_predictor=PREDICTORS[vocoder]())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    keys = set(model.state_dict())
    assert len(keys) == 328
    assert {
        "m_source.l_linear.weight",
        "f0_predictor.condnet.8.parametrizations.weight.original0",
        "conv_pre.parametrizations.weight.original1",
        "ups.2.bias",
        "source_downs.0.weight",
        "source_resblocks.2.convs2.2.bias",
        "resblocks.8.activations1.2.alpha",
        "conv_post.parametrizations.weight.original0",
    } <= keys


@both
def test_folded_weight_norm_gives_the_same_waveform(vocoder: type[HiFTGenerator]) -> None:
    model, mel = make_hift(vocoder), make_mel(20)
    before = vocode_whole(model, mel)
    fold_weight_norm(model)
    assert not any("parametrizations" in key for key in model.state_dict())
    torch.testing.assert_close(vocode_whole(model, mel), before, atol=1e-5, rtol=0)


@both
def test_samples_stay_within_the_limit(vocoder: type[HiFTGenerator]) -> None:
    model = make_hift(vocoder)
    model.conv_post.bias.add_(5.0)  # louder by e^5
    assert float(vocode_whole(model, make_mel(20)).abs().max()) == pytest.approx(0.99)


@both
def test_a_batch_can_be_trained(vocoder: type[HiFTGenerator]) -> None:
    model = make_hift(vocoder).requires_grad_(True)
    mel = torch.randn(2, 80, 12)
    speech, f0 = model(mel, noise=torch.randn(2, 12 * 480, 9))
    assert speech.shape == (2, 12 * 480) and f0.shape == (2, 12)
    (speech.square().mean() + f0.mean()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
