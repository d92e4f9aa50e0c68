from __future__ import annotations

import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.streaming import State, flatten_state, state_bytes
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.voice_states import FlowPrompt, VoiceStates
from cosy_engine.token2wav.work import complete
from tests.token2wav.test_session import random_prompt, random_tokens, run

CPU = torch.device("cpu")


@torch.inference_mode()
def after(states: VoiceStates, model: CosyVoiceModel, seed: int) -> State:
    prompt = random_prompt(77, seed)
    return complete(states.after(prompt, FlowPrompt(model.flow, prompt)))


def frames_fed(model: CosyVoiceModel, token2wav: Token2Wav, monkeypatch, tokens: int) -> int:
    """Mel frames that the flow computes for one request with a prompt of 77 tokens."""
    fed = 0
    begin_chunk = type(model.flow).begin_chunk

    def counting(flow, token, cond, *arguments, **options):
        nonlocal fed
        fed += cond.shape[2]
        return begin_chunk(flow, token, cond, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.flow), "begin_chunk", counting)
        run(token2wav.session(random_prompt(77), HopSettings(), stream=True, seed=7), random_tokens(tokens))
    return fed


def test_of_a_voice_that_was_used_before_only_the_look_ahead_is_fed_again(model: CosyVoiceModel, monkeypatch) -> None:
    token2wav = Token2Wav(model.flow, model.hift)
    assert frames_fed(model, token2wav, monkeypatch, 60) == 2 * (77 + 60)
    assert frames_fed(model, token2wav, monkeypatch, 60) == 2 * (3 + 60)


def test_a_used_voice_sounds_the_same_to_the_last_bit(model: CosyVoiceModel) -> None:
    prompt, tokens = random_prompt(77), random_tokens(120)
    token2wav = Token2Wav(model.flow, model.hift)
    cold, warm = (
        torch.cat(run(token2wav.session(prompt, HopSettings(), stream=True, seed=7), tokens)) for _ in range(2)
    )
    assert torch.equal(cold, warm)


def test_going_on_from_a_state_leaves_it_as_it_was(model: CosyVoiceModel) -> None:
    prompt = random_prompt(77)
    given, states = FlowPrompt(model.flow, prompt), VoiceStates(model.flow, [(CPU, 2**30)])
    assert states.position(given) == 74
    state = after(states, model, 0)
    before = state_bytes(state)
    with torch.inference_mode():
        token = torch.zeros(1, 28, dtype=torch.int32)
        model.flow.forward_chunk(token, given.condition(148, 198), given.speaker, state, finalize=False)
    assert state_bytes(state) > before == state_bytes(after(states, model, 0))


def test_the_budget_holds_and_the_least_recently_used_voice_goes(model: CosyVoiceModel) -> None:
    one = state_bytes(after(VoiceStates(model.flow, [(CPU, 2**30)]), model, 0))
    states = VoiceStates(model.flow, [(CPU, 2 * one)])
    for seed in (0, 1, 0, 2):
        after(states, model, seed)
    assert states.held == [2 * one]
    assert [random_prompt(77, seed) in states for seed in range(3)] == [True, False, True]


def test_what_leaves_the_first_memory_is_kept_in_the_second(model: CosyVoiceModel) -> None:
    fresh = VoiceStates(model.flow, [(CPU, 2**30)])
    one = state_bytes(after(fresh, model, 0))
    states = VoiceStates(model.flow, [(CPU, one), (CPU, one)])
    for seed in (0, 1):
        after(states, model, seed)
    assert states.held == [one, one]
    again = after(states, model, 0)  # back from the second memory, and 1 goes there
    assert states.held == [one, one]
    after(states, model, 2)
    assert [random_prompt(77, seed) in states for seed in range(3)] == [True, False, True]
    for name, tensor in flatten_state(after(fresh, model, 0)).items():
        assert torch.equal(flatten_state(again)[name], tensor), name


def test_a_voice_larger_than_the_budget_is_served_and_not_kept(model: CosyVoiceModel) -> None:
    states = VoiceStates(model.flow, [(CPU, 1)])
    assert state_bytes(after(states, model, 0)) > 1
    assert states.held == [0]
