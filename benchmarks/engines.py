"""Engines that share one model and one speech LM, for comparing them in one process."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch

from cosy_engine.audio.encode import wav_bytes
from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import Settings, VllmSettings
from cosy_engine.cores import half_of_the_cores
from cosy_engine.engine import Engine
from cosy_engine.frontend import Prompt
from cosy_engine.speech_lm.base import SpeechLM, SpeechLMRequest
from cosy_engine.speech_lm.torch_lm import TorchSpeechLM
from cosy_engine.speech_lm.vllm_export import write_export

TOKENS_PER_SECOND = 25
PROMPT_SECONDS = 5
UNBOUNDED = {"voice_cache": 2**50, "stream_memory": 2**50}  # for streams without an engine
SPOKEN = "What is said in it."
TEXT = "The first sound of this sentence should reach the listener before its last word was thought of."
Backend = Literal["torch", "vllm"]


class FixedLength:
    """A speech LM that answers every request with as many codes. Whoever made the LM closes it.

    Attributes:
        tokens: how many; may be changed between requests.
    """

    def __init__(self, speech_lm: SpeechLM, tokens: int) -> None:
        self.name, self._speech_lm, self.tokens = speech_lm.name, speech_lm, tokens

    def generate(self, request: SpeechLMRequest) -> AsyncIterator[int]:
        ratio = (self.tokens + 0.5) / len(request.text)
        return self._speech_lm.generate(replace(request, min_ratio=ratio, max_ratio=ratio))

    def close(self) -> None:
        pass


@contextmanager
def running_speech_lm(model: CosyVoiceModel, backend: Backend) -> Iterator[SpeechLM]:
    """The model's speech LM; vLLM gets an export, and the model keeps only the sizes."""
    with tempfile.TemporaryDirectory() as export:
        if backend == "torch":
            threads = half_of_the_cores() if model.device.type == "cpu" else None  # as the engine does
            speech_lm: SpeechLM = TorchSpeechLM(model.lm, model.device, threads=threads)
        else:
            from cosy_engine.speech_lm.vllm_lm import VllmSpeechLM

            write_export(model.lm, Path(export))
            model.lm.to("meta")
            speech_lm = VllmSpeechLM(model.lm, Path(export), VllmSettings())
        try:
            yield speech_lm
        finally:
            speech_lm.close()


@contextmanager
def running_engine(model: CosyVoiceModel, speech_lm: SpeechLM, settings: Settings) -> Iterator[Engine]:
    """A warm engine around what is there already."""
    with mock.patch("cosy_engine.engine._speech_lm", lambda *_: speech_lm):
        engine = Engine(model, settings)
    try:
        engine._warm_up()
        yield engine
    finally:
        engine.close()


def made_up_prompt(seconds: float, model: CosyVoiceModel, seed: int = 0) -> Prompt:
    """Random codes and mel: a voice for measuring, not for listening."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(seconds * TOKENS_PER_SECOND)
    return Prompt(
        text="",
        text_token=torch.zeros(0, dtype=torch.int32),
        speech_token=torch.tensor(made_up_tokens(tokens, model, seed), dtype=torch.int32),
        speech_feat=torch.randn(2 * tokens, model.mel.num_mels, generator=generator),
        embedding=torch.randn(model.flow.spk_embed_affine_layer.in_features, generator=generator),
    )


def made_up_tokens(count: int, model: CosyVoiceModel, seed: int) -> list[int]:
    """Random speech tokens."""
    return torch.randint(model.flow.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def recording(seed: int) -> bytes:
    """Five seconds of a humming voice, another one for each seed."""
    time_axis = np.arange(16000 * PROMPT_SECONDS) / 16000
    pitch = 120 + 7 * seed + 20 * np.sin(2 * np.pi * 0.7 * time_axis)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_axis))
    return wav_bytes((0.2 * wave).astype(np.float32), 16000)
