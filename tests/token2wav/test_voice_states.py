from __future__ import annotations

import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import HopSettings
from cosy_engine.modules.streaming import state_bytes
from cosy_engine.token2wav.token2wav import Token2Wav
from cosy_engine.token2wav.voice_states import FlowPrompt, VoiceStates
from tests.token2wav.test_session import random_prompt, random_tokens, run


def frames_fed(model: CosyVoiceModel, token2wav: Token2Wav, monkeypatch, tokens: int) -> int:
    """Mel frames that the flow computes for one request with a prompt of 77 tokens."""
    fed = 0
    forward_chunk = type(model.flow).forward_chunk

    def counting(flow, token, cond, *arguments, **options):
        nonlocal fed
        fed += cond.shape[2]
        return forward_chunk(flow, token, cond, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.flow), "forward_chunk", counting)
        run(token2wav.session(random_prompt(77), HopSettings(), stream=True, seed=7), random_tokens(tokens))
    return fed


def test_a_voice_that_was_used_before_costs_no_whole_prompt_chunk(model: CosyVoiceModel, monkeypatch) -> None:
    token2wav = Token2Wav(model.flow, model.hift)
    assert frames_fed(model, token2wav, monkeypatch, 60) == 2 * (77 + 60)
    assert frames_fed(model, token2wav, monkeypatch, 60) == 2 * (77 - 50 + 60)  # 50 tokens: two whole chunks


def test_a_used_voice_sounds_the_same_to_the_last_bit(model: CosyVoiceModel) -> None:
    prompt, tokens = random_prompt(77), random_tokens(120)
    token2wav = Token2Wav(model.flow, model.hift)
    cold, warm = (
        torch.cat(run(token2wav.session(prompt, HopSettings(), stream=True, seed=7), tokens)) for _ in range(2)
    )
    assert torch.equal(cold, warm)


def test_going_on_from_a_state_leaves_it_as_it_was(model: CosyVoiceModel) -> None:
    prompt = random_prompt(77)
    given, states = FlowPrompt(model.flow, prompt), VoiceStates(model.flow, 2**30)
    position, state = states.after(prompt, given)
    before = state_bytes(state)
    with torch.inference_mode():
        token = torch.zeros(1, 28, dtype=torch.int32)
        model.flow.forward_chunk(token, given.condition(100, 150), given.speaker, state, finalize=False)
    again, untouched = states.after(prompt, given)
    assert (position, again) == (50, 50)
    assert state_bytes(state) > before == state_bytes(untouched)


def test_the_budget_holds_and_the_least_recently_used_voice_goes(model: CosyVoiceModel) -> None:
    prompts = [random_prompt(77, seed) for seed in range(3)]
    given = [FlowPrompt(model.flow, prompt) for prompt in prompts]
    one = state_bytes(VoiceStates(model.flow, 2**30).after(prompts[0], given[0])[1])
    states = VoiceStates(model.flow, 2 * one)
    for number in (0, 1, 0, 2):
        states.after(prompts[number], given[number])
    assert states.held <= 2 * one
    assert [prompts[number] in states for number in range(3)] == [True, False, True]


def test_a_voice_larger_than_the_budget_is_served_and_not_kept(model: CosyVoiceModel) -> None:
    prompt = random_prompt(77)
    states = VoiceStates(model.flow, 1)
    position, _ = states.after(prompt, FlowPrompt(model.flow, prompt))
    assert position == 50 and states.held == 0
