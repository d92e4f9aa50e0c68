"""Checks of the speech LMs, their sampling and the filter of long silences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from cosy_engine.modules import qwen2_lm
from cosy_engine.modules.qwen2_lm import KVCache
from cosy_engine.speech_lm import upstream
from cosy_engine.speech_lm.base import SpeechLMRequest
from cosy_engine.speech_lm.decoding import SpeechCodeLM, TextInbox
from cosy_engine.speech_lm.sampling import SamplingSettings, nucleus_candidates, nucleus_sample, ras_two_step
from cosy_engine.speech_lm.silence import SilenceFilter
from tests.golden.registry import Case, CheckResult, check


def build_lm(case: Case) -> SpeechCodeLM:
    """The case's model with its weights."""
    constructor = case.meta["constructor"]
    lm_class = {"Qwen2LM": qwen2_lm.Qwen2LM, "CosyVoice3LM": qwen2_lm.CosyVoice3LM}[constructor["class"]]
    lm = lm_class(**constructor["lm"], llm=qwen2_lm.Qwen2Encoder(constructor["qwen2_config"]))
    lm.load_state_dict(case.weights("model"), strict=True)
    return lm.eval()


def _ids(case: Case, name: str) -> list[int]:
    return case.ins[name][0].tolist() if name in case.ins else []


def _greedy(scores: Tensor, decoded: Sequence[int]) -> int:
    return int(scores.argmax())


@check("lm_inference")
def lm_inference(case: Case, result: CheckResult) -> None:
    """The first steps, one by one, and the same ids from the generator."""
    lm = build_lm(case)
    text, prompt_text, prompt_speech = (_ids(case, name) for name in ("text", "prompt_text", "prompt_speech_token"))
    request = SpeechLMRequest(text, prompt_text, prompt_speech)
    steps, (fewest, _) = case.meta["call"]["steps"], request.length_limits(len(text))

    feed = lm.prompt(prompt_text + text, prompt_speech)
    result.close("lm_input", feed, case.outs["lm_input"])
    rows: dict[str, list[Tensor]] = {name: [] for name in ("hidden", "logits", "logp", "logp_after_eos_mask")}
    lm.llm.register_forward_hook(lambda module, args, output: rows["hidden"].append(output[:, -1]))
    lm.llm_decoder.register_forward_hook(lambda module, args, output: rows["logits"].append(output))
    cache, tokens = KVCache(), []
    for step in range(steps):
        logp = lm.next_scores(feed, cache)
        masked = logp.clone()
        if step < fewest:
            masked[:, upstream.withheld_ids(lm)] = float("-inf")
        rows["logp"].append(logp)
        rows["logp_after_eos_mask"].append(masked)
        tokens.append(_greedy(masked, tokens))
        feed = lm.embed_speech(tokens[-1:])
    for name, values in rows.items():
        result.close(name, torch.cat(values), case.outs[name])
    result.equal("tokens", tokens, case.outs["tokens"].tolist())

    generated = list(islice(upstream.unistream(lm, request, _greedy), steps))
    ended = next((step for step, token in enumerate(tokens) if token >= lm.speech_token_size), steps)
    result.equal("generated tokens", generated, tokens[:ended])


@check("lm_bistream")
def lm_bistream(case: Case, result: CheckResult) -> None:
    """Everything fed to the backbone while text arrives, its scores, and the codes."""
    lm = build_lm(case)
    call = case.meta["call"]
    calls = 0

    def choose(scores: Tensor, decoded: Sequence[int]) -> int:
        nonlocal calls
        calls += 1
        return lm.eos_token if calls > call["eos_after"] else int(scores[: lm.speech_token_size].argmax())

    fed: list[Tensor] = []
    logp: list[Tensor] = []
    lm.llm.register_forward_pre_hook(lambda module, args: fed.append(args[0][0]))
    lm.llm_decoder.register_forward_hook(lambda module, args, output: logp.append(output.log_softmax(dim=-1)))
    end_of_prompt = call["endofprompt_id"] if isinstance(lm, qwen2_lm.CosyVoice3LM) else None
    request = SpeechLMRequest([], _ids(case, "prompt_text"), _ids(case, "prompt_speech_token"))
    inbox = TextInbox()
    inbox.tokens.extend(_ids(case, "text"))
    inbox.closed = True
    tokens = list(upstream.bistream(lm, request, inbox, choose, end_of_prompt))
    result.equal("tokens", tokens, case.outs["tokens"].tolist())
    result.equal("forward_input_len", [len(rows) for rows in fed], case.outs["forward_input_len"].tolist())
    result.close("forward_inputs", torch.cat(fed), case.outs["forward_inputs"])
    result.close("logp", torch.cat(logp), case.outs["logp"])


@check("ras")
def ras(case: Case, result: CheckResult) -> None:
    """The two-step procedure with torch's global random numbers."""
    call = case.meta["call"]
    settings = SamplingSettings(call["top_p"], call["top_k"], call["win_size"], call["tau_r"])
    for number, drawn in enumerate(call["cases"]):
        scores, decoded = case.ins[f"logp{drawn['logp']}"], drawn["decoded_tokens"]
        torch.manual_seed(drawn["seed"])
        first = nucleus_sample(scores, settings.top_p, settings.top_k)
        torch.manual_seed(drawn["seed"])
        chosen = ras_two_step(scores, decoded, settings)
        result.equal(f"nucleus_first_pick[{number}]", first, int(case.outs["nucleus_first_pick"][number]))
        repeats = decoded[-settings.win_size :].count(first)
        result.equal(f"repeat_count[{number}]", repeats, int(case.outs["repeat_count"][number]))
        result.equal(f"chosen[{number}]", chosen, int(case.outs["chosen"][number]))


@check("nucleus")
def nucleus(case: Case, result: CheckResult) -> None:
    """Candidate sets, which need no random numbers."""
    for number, wanted in enumerate(case.meta["call"]["cases"]):
        scores = case.ins[f"logp{wanted['logp']}"]
        ids, probabilities = nucleus_candidates(scores, wanted["top_p"], wanted["top_k"])
        result.equal(f"case{number}.indices", ids.tolist(), case.outs[f"case{number}.indices"].tolist())
        result.close(f"case{number}.probs", probabilities, case.outs[f"case{number}.probs"])


@check("silent_filter")
def silent_filter(case: Case, result: CheckResult) -> None:
    """Codes kept out of a stream, with the case's silent set and with none."""
    constructor = case.meta["constructor"]
    for number, item in enumerate(case.meta["items"]):
        for name, silent in (("cosyvoice3", frozenset(constructor["silent_tokens"])), ("cosyvoice2", frozenset())):
            silence = SilenceFilter(silent, constructor["max_silent_token_num"])
            kept = [code for code in item["lm_tokens"] if silence.keeps(code)]
            result.equal(f"{name}[{number}]", kept, item[f"kept_{name}"])
