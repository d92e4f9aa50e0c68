"""Load a CosyVoice2 or CosyVoice3 model directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cosy_engine.audio.features import MelSettings
from cosy_engine.checkpoint.build import PARTS, TEXT_MODEL, build_modules, empty_parameters, with_early_defaults
from cosy_engine.checkpoint.download import resolve_model_dir
from cosy_engine.checkpoint.fingerprint import SPEAKER_ENCODER, SPEECH_TOKENIZERS, Name, find_config, fingerprint_of
from cosy_engine.checkpoint.read_yaml import Call, read_config
from cosy_engine.checkpoint.weights import Part, load_parts
from cosy_engine.config import SamplingSettings
from cosy_engine.errors import InvalidRequestError, ModelDirectoryError
from cosy_engine.modules.qwen2_lm import CosyVoice3LM, Qwen2LM
from cosy_engine.modules.streaming_layers import fold_weight_norm

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEXT_FILES = tuple(f"{TEXT_MODEL}/{name}" for name in ("config.json", "vocab.json", "merges.txt"))
_LONGEST_PAUSE = 5.0  # seconds
_LFS_POINTER = b"version https://git-lfs"


@dataclass
class CosyVoiceModel:
    """A loaded model: the networks in eval mode on `device`, and everything else its directory says.

    Attributes:
        sampling: the speech LM's published sampling.
        pause: seconds of silence after a piece of text, for a model that ends with its last sound.
        continues_recordings: whether the speech LM goes on from what is said in a visitor's recording; otherwise only
            the flow hears it, and zero_shot is cross_lingual. The directory's own voices are continued anyhow.
        allowed_special: which markers of the text are kept ("all" in the published files).
        tokenizer_dir, speech_tokenizer_path, speaker_encoder_path: what the front end needs.
        fingerprint: what a voice is tied to; equal when the name and both ONNX models are.
        dtype: precision of the speech LM and the flow; the vocoder is always float32.
    """

    name: Name
    directory: Path
    sample_rate: int
    lm: nn.Module
    flow: nn.Module
    hift: nn.Module
    mel: MelSettings
    sampling: SamplingSettings
    pause: float
    continues_recordings: bool
    allowed_special: str
    tokenizer_dir: Path
    speech_tokenizer_path: Path
    speaker_encoder_path: Path
    fingerprint: str
    device: torch.device
    dtype: torch.dtype


def load_model(
    model_dir: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CosyVoiceModel:
    """Load a model directory, or download one by its id first (see `resolve_model_dir`). Nothing in it is run.

    Args:
        model_dir: a directory, `org/name`, `modelscope:org/name` or `hf:org/name`.
        dtype: precision of the speech LM and the flow.

    Raises:
        UnsafeModelError: the directory asks for code to be run.
        ModelDirectoryError: it cannot be had, lacks files (all are named), or its weights do not fit.
    """
    directory = resolve_model_dir(model_dir).absolute()
    config_path, name = find_config(directory)
    config = with_early_defaults(read_config(config_path))
    weights = _find_files(directory, name)
    with empty_parameters():
        lm, flow, hift = build_modules(config, directory)
    if isinstance(lm, CosyVoice3LM) != (name == "cosyvoice3"):
        raise ModelDirectoryError(f"{config_path.name} describes another model: {type(lm).__name__}.")
    mel = _settings(MelSettings, config.get("feat_extractor"), "feat_extractor")
    sampling = _settings(SamplingSettings, config["llm"].kwargs.get("sampling"), "sampling of the llm")

    device = torch.device(device)
    parts = zip(PARTS, (lm, flow, hift), (dtype, dtype, torch.float32), strict=True)
    load_parts([Part(weights[part], module, kept_in) for part, module, kept_in in parts], device)
    fold_weight_norm(hift)
    for module in (lm, flow, hift):
        module.eval().requires_grad_(False)

    return CosyVoiceModel(
        name=name,
        directory=directory,
        sample_rate=hift.m_source.sampling_rate,
        lm=lm,
        flow=flow,
        hift=hift,
        mel=mel,
        sampling=sampling,
        pause=_pause(config),
        continues_recordings=_continues_recordings(config),
        allowed_special=config.get("allowed_special", "all"),
        tokenizer_dir=directory / TEXT_MODEL,
        speech_tokenizer_path=directory / SPEECH_TOKENIZERS[name],
        speaker_encoder_path=directory / SPEAKER_ENCODER,
        fingerprint=fingerprint_of(directory),
        device=device,
        dtype=dtype,
    )


def _pause(config: Mapping[str, Any]) -> float:
    pause = config.get("pause_after_text", 0.0)
    if isinstance(pause, bool) or not isinstance(pause, int | float) or not 0 <= pause <= _LONGEST_PAUSE:
        raise ModelDirectoryError(
            f"pause_after_text is {pause!r}; it must be a number of seconds from 0 to {_LONGEST_PAUSE:.0f}."
        )
    return float(pause)


def _continues_recordings(config: Mapping[str, Any]) -> bool:
    continues = config.get("continues_recordings", True)
    if not isinstance(continues, bool):
        raise ModelDirectoryError(f"continues_recordings is {continues!r}; it must be true or false.")
    return continues


def load_speech_lm(directory: Path) -> Qwen2LM | CosyVoice3LM:
    """The speech LM alone, in float32 on the CPU, of a local model directory.

    Raises:
        UnsafeModelError, ModelDirectoryError: as `load_model`.
    """
    weights = find_weights(directory, "llm")
    with empty_parameters():
        lm, _, _ = build_modules(with_early_defaults(read_config(find_config(directory)[0])), directory)
    load_parts([Part(weights, lm, torch.float32)], torch.device("cpu"))
    return lm.eval().requires_grad_(False)


def find_weights(directory: Path, part: str) -> Path:
    """The weight file of one part.

    Raises:
        ModelDirectoryError: the directory lacks files.
    """
    return _find_files(directory, find_config(directory)[1])[part]


def _find_files(directory: Path, name: Name) -> dict[str, Path]:
    """The weight file of each part, after everything that the model needs has been found."""
    weights = {
        part: next(
            (path for suffix in ("pt", "safetensors") if (path := directory / f"{part}.{suffix}").exists()), None
        )
        for part in PARTS
    }
    missing = [f"{part}.pt (or {part}.safetensors)" for part, path in weights.items() if path is None]
    others = [SPEECH_TOKENIZERS[name], SPEAKER_ENCODER, *_TEXT_FILES]
    missing += [file for file in others if not (directory / file).is_file()]
    found = [path for path in (*weights.values(), *(directory / file for file in others)) if path and path.is_file()]
    missing += [f"{path.name} (only a Git LFS pointer: run `git lfs pull`)" for path in found if _is_pointer(path)]
    if missing:
        raise ModelDirectoryError(
            f"{directory} is incomplete. Missing: {', '.join(missing)}. Download the model again, or copy these files "
            "into it.",
            param="model_dir",
        )
    return weights


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _settings(cls: type[T], call: Any, what: str) -> T:
    """A settings object from the arguments of a call in the configuration; those that it does not know are left."""
    if not isinstance(call, Call):
        raise ModelDirectoryError(f"The configuration has no {what}.")
    known = {field.name for field in fields(cls)}
    try:
        return cls(**{key: value for key, value in call.kwargs.items() if key in known})
    except (InvalidRequestError, TypeError) as error:
        raise ModelDirectoryError(f"The {what} of the configuration does not fit: {error}") from None
