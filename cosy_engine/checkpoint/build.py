"""Build the three networks of a model from its configuration, with this project's classes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cosy_engine.checkpoint.read_yaml import Call
from cosy_engine.errors import ModelDirectoryError
from cosy_engine.modules.dit import DiT
from cosy_engine.modules.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor
from cosy_engine.modules.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec
from cosy_engine.modules.flow_matching import CausalConditionalCFM
from cosy_engine.modules.hift import CausalHiFTGenerator, HiFTGenerator
from cosy_engine.modules.qwen2_lm import CosyVoice3LM, Qwen2Encoder, Qwen2LM
from cosy_engine.modules.unet import CausalConditionalDecoder
from cosy_engine.modules.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder

TEXT_MODEL = "CosyVoice-BlankEN"  # folder of the text model's configuration and tokenizer
PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "llm": (Qwen2LM, CosyVoice3LM),
    "flow": (CausalMaskedDiffWithXvec, CausalMaskedDiffWithDiT),
    "hift": (HiFTGenerator, CausalHiFTGenerator),
}

CLASSES: dict[str, type[nn.Module]] = {
    "cosyvoice.llm.llm.Qwen2LM": Qwen2LM,
    "cosyvoice.llm.llm.CosyVoice3LM": CosyVoice3LM,
    "cosyvoice.llm.llm.Qwen2Encoder": Qwen2Encoder,
    "cosyvoice.flow.flow.CausalMaskedDiffWithXvec": CausalMaskedDiffWithXvec,
    "cosyvoice.flow.flow.CausalMaskedDiffWithDiT": CausalMaskedDiffWithDiT,
    "cosyvoice.flow.flow_matching.CausalConditionalCFM": CausalConditionalCFM,
    "cosyvoice.flow.decoder.ConditionalDecoder": CausalConditionalDecoder,  # its name in early releases
    "cosyvoice.flow.decoder.CausalConditionalDecoder": CausalConditionalDecoder,
    "cosyvoice.flow.DiT.dit.DiT": DiT,
    "cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder": UpsampleConformerEncoder,
    "cosyvoice.transformer.upsample_encoder.PreLookaheadLayer": PreLookaheadLayer,
    "cosyvoice.hifigan.generator.HiFTGenerator": HiFTGenerator,
    "cosyvoice.hifigan.generator.CausalHiFTGenerator": CausalHiFTGenerator,
    "cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor": ConvRNNF0Predictor,
    "cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor": CausalConvRNNF0Predictor,
}

# Neither part of a network: sampling belongs to the request, random chunk sizes to training.
_NOT_FOR_MODULES = ("sampling", "use_dynamic_chunk", "use_dynamic_left_chunk")

# What early CosyVoice2 releases leave out.
_EARLY_DEFAULTS = {
    "llm": Call(
        "cosyvoice.llm.llm.Qwen2LM",
        {
            "llm_input_size": 896,
            "llm_output_size": 896,
            "speech_token_size": 6561,
            "llm": Call("cosyvoice.llm.llm.Qwen2Encoder"),
            "sampling": Call("cosyvoice.utils.common.ras_sampling"),
        },
    ),
    "hift": Call(
        "cosyvoice.hifigan.generator.HiFTGenerator",
        {"f0_predictor": Call("cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor")},
    ),
}


def with_early_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the published `llm` and `hift` sections where it has none."""
    return _EARLY_DEFAULTS | config


def build_modules(config: dict[str, Any], directory: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The speech LM, the flow and the vocoder of a configuration read by `read_config`, with random weights.

    The text model's sizes come from `directory`/CosyVoice-BlankEN/config.json, whatever path the configuration gives.

    Raises:
        ModelDirectoryError: a part is missing, or has arguments that its class does not take.
    """
    modules = []
    for part, classes in PARTS.items():
        if not isinstance(config.get(part), Call):
            raise ModelDirectoryError(f"The configuration has no `{part}: !new:...` section.")
        modules.append(_instantiate(config[part], directory))
        if not isinstance(modules[-1], classes):
            raise ModelDirectoryError(f"`{part}` cannot be a {type(modules[-1]).__name__}.")
    lm, flow, hift = modules
    return lm, flow, hift


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters that this thread makes inside have shapes only (device "meta"): neither memory nor time is spent on
    values that the weights will replace. Buffers are made as usual."""
    thread = threading.get_ident()

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_values)
    try:
        yield
    finally:
        hook.remove()


def _instantiate(value: Any, directory: Path) -> Any:
    if isinstance(value, list):
        return [_instantiate(item, directory) for item in value]
    if isinstance(value, dict):
        return {key: _instantiate(item, directory) for key, item in value.items()}
    if not isinstance(value, Call):
        return value
    cls = CLASSES.get(value.name)
    if cls is None:
        raise ModelDirectoryError(f"`{value.name}` is known, but has no place in a model's networks.")
    if cls is Qwen2Encoder:
        return Qwen2Encoder(directory / TEXT_MODEL)
    kwargs = {key: _instantiate(item, directory) for key, item in value.kwargs.items() if key not in _NOT_FOR_MODULES}
    try:
        return cls(**kwargs)
    except ModelDirectoryError:
        raise
    except Exception as error:  # whatever the arguments of somebody's file make a constructor raise
        raise ModelDirectoryError(f"The configuration of {value.name} does not fit: {error}") from None
