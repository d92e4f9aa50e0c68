"""Checks of the flow: encoder, velocity estimators, solver, and the whole from tokens to mel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosy_engine.modules.dit import DiT
from cosy_engine.modules.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.streaming import init_state
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder
from tests.golden.registry import Case, CheckResult, check


def build_estimator(arguments: dict[str, Any]) -> nn.Module:
    """The velocity estimator of these constructor arguments: the DiT has a `dim`, the U-Net has not."""
    return DiT(**arguments) if "dim" in arguments else CausalConditionalDecoder(**arguments)


def build_flow(constructor: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """A flow of the sizes in `constructor` (`flow`, `encoder` or `pre_lookahead_layer`, `cfm`, `estimator`)."""
    decoder = CausalConditionalCFM(**constructor["cfm"], estimator=build_estimator(constructor["estimator"]))
    if "encoder" in constructor:
        encoder = UpsampleConformerEncoder(**constructor["encoder"])
        flow = CausalMaskedDiffWithXvec(**constructor["flow"], encoder=encoder, decoder=decoder)
    else:
        layer = PreLookaheadLayer(**constructor["pre_lookahead_layer"])
        flow = CausalMaskedDiffWithDiT(**constructor["flow"], pre_lookahead_layer=layer, decoder=decoder)
    flow.load_state_dict(weights)
    return flow.eval()


def _recorded(module: nn.Module, method: str) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Arguments, keyword arguments and result of each call of a method from now on."""
    calls, run = [], getattr(module, method)

    def recording(*arguments: Any, **named: Any) -> Any:
        result = run(*arguments, **named)
        calls.append((arguments, named, result))
        return result

    setattr(module, method, recording)
    return calls


@check("cv2_encoder")
def check_encoder(case: Case, result: CheckResult) -> None:
    encoder = UpsampleConformerEncoder(**case.meta["constructor"])
    encoder.load_state_dict(case.weights("model"))
    encoder.eval()
    lens = case.ins["xs_lens"]
    features, mask = encoder(case.ins["xs"], lens, case.ins.get("context"), streaming=case.meta["call"]["streaming"])
    result.equal("mask", mask.tolist(), case.outs["mask"].tolist())
    for row, length in enumerate((lens * encoder.upsample_stride).tolist()):
        result.close(f"h[{row}]", features[row, :length], case.outs["h"][row, :length])


@check("cv2_estimator", "cv3_estimator")
def check_estimator(case: Case, result: CheckResult) -> None:
    estimator = build_estimator(case.meta["constructor"])
    estimator.load_state_dict(case.weights("model"))
    velocity = estimator.eval()(**case.ins, streaming=case.meta["call"]["streaming"])
    result.close("y", velocity, case.outs["y"])


@check("cv2_cfm", "cv3_cfm")
def check_cfm(case: Case, result: CheckResult) -> None:
    constructor, call = case.meta["constructor"], case.meta["call"]
    estimator = build_estimator(constructor["estimator"])
    estimator.load_state_dict(case.weights("model"))
    cfm = CausalConditionalCFM(**constructor["cfm"], estimator=estimator).eval()
    entering: list[tuple[Tensor, Tensor]] = []
    estimator.register_forward_pre_hook(lambda _, inputs: entering.append((inputs[0][0], inputs[3][0])))
    times = _recorded(estimator, "time_features")
    mel = cfm(**case.ins, n_timesteps=call["n_timesteps"], temperature=call["temperature"], streaming=call["streaming"])
    result.close("y", mel, case.outs["y"])
    result.close("x_before_step", torch.stack([x for x, _ in entering]), case.outs["x_before_step"])
    (((t_at_step,), _, features),) = times
    result.close("t_at_step", t_at_step, case.outs["t_at_step"])
    result.close("time features at step", torch.stack([entered for _, entered in entering]), features)


@check("cv2_flow_inference", "cv3_flow_inference")
def check_flow_inference(case: Case, result: CheckResult) -> None:
    flow = build_flow(case.meta["constructor"], case.weights("model"))
    begun = _recorded(flow.decoder, "begin")
    call = case.meta["call"]
    mel = flow.inference(
        **case.ins, streaming=call["streaming"], finalize=call["finalize"], n_timesteps=call["n_timesteps"]
    )
    ((_, handed, _),) = begun
    result.close("mel", mel, case.outs["mel"])
    result.close("decoder_mu", handed["mu"], case.outs["decoder_mu"])
    result.close("decoder_spks", handed["spks"], case.outs["decoder_spks"])
    nonzero_frames = int(handed["cond"].ne(0).any(dim=1).sum())
    result.equal("decoder_cond_nonzero_frames", nonzero_frames, int(case.outs["decoder_cond_nonzero_frames"]))


@check("cv2_flow_stream", "cv3_flow_stream")
def check_flow_stream(case: Case, result: CheckResult) -> None:
    """The public loop, which computes everything again for each chunk, and the same chunks fed once with a state.

    The second is compared where chunks end with the mask's chunks; elsewhere the public loop changes what it has sent.
    """
    flow = build_flow(case.meta["constructor"], case.weights("model"))
    token, prompt_token, prompt_feat, embedding = (
        case.ins[name] for name in ("token", "prompt_token", "prompt_feat", "embedding")
    )
    ratio, plan = flow.token_mel_ratio, case.meta["recorded"]["plan"]

    def recompute(fed: int, offset: int, streaming: bool, finalize: bool) -> Tensor:
        mel = flow.inference(
            token[:, :fed], prompt_token, prompt_feat, embedding, streaming=streaming, finalize=finalize
        )
        return mel[:, :, offset * ratio :]

    for step in plan:
        fed, offset = step["n_token_passed"], step["token_offset"]
        mel = recompute(fed, offset, step["streaming"], step["finalize"])
        result.equal(f"chunk{step['chunk']} frames", mel.shape[2], step["mel_frames"])
        result.close(f"chunk{step['chunk']}", mel, case.outs[f"chunk{step['chunk']}.mel"])
    last = plan[-1]
    expected_last = case.outs["final_streaming_true.mel"]
    mel = recompute(last["n_token_passed"], last["token_offset"], streaming=True, finalize=True)
    result.close("final_streaming_true", mel, expected_last)

    lookahead, prompt = flow.pre_lookahead_len, prompt_token.shape[1]
    ends = [prompt + step["n_token_passed"] - (0 if step["finalize"] else lookahead) for step in plan]
    if any(end % flow.chunk_size for end in ends[:-1]):
        return
    state = init_state(flow, 1, prompt_feat.device, prompt_feat.dtype)
    tokens = torch.cat([prompt_token, token], dim=1)
    position = 0
    for step, end in zip(plan, ends, strict=True):
        first_frame, last_frame = position * ratio, end * ratio
        cond = F.pad(prompt_feat, (0, 0, 0, tokens.shape[1] * ratio - prompt_feat.shape[1])).transpose(1, 2)
        mel = flow.forward_chunk(
            tokens[:, position : prompt + step["n_token_passed"]],
            cond[:, :, first_frame:last_frame],
            flow.project_speaker(embedding),
            state,
            finalize=step["finalize"],
        )
        mel = mel[:, :, max(0, prompt_feat.shape[1] - first_frame) :]
        expected = expected_last if step is last else case.outs[f"chunk{step['chunk']}.mel"]
        result.close(f"incremental chunk{step['chunk']}", mel, expected)
        position = end
