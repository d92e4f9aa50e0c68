"""The engine on a ZeroGPU Space, where a GPU is there only while a decorated function runs, in a forked process.

The model is put on `cuda` when the page starts, which ZeroGPU records and repeats in that process. Threads do not
survive a fork, so the process makes an engine of its own around the same model.
"""

from __future__ import annotations

import asyncio
import html
import logging
import os
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import torch

from cosy_engine.checkpoint.load import CosyVoiceModel
from cosy_engine.config import Settings
from cosy_engine.engine import AudioChunk, Engine, SynthesisRequest, Timings
from cosy_engine.errors import CosyError, InvalidRequestError
from cosy_engine.frontend import Prompt

logger = logging.getLogger(__name__)

_SHORTEST, _LONGEST = 15, 120  # seconds of GPU that one request may ask for
_SECONDS_PER_CHARACTER = 0.06

_Fields = dict[str, str | np.ndarray]


def on_zerogpu() -> bool:
    """Whether this is a ZeroGPU Space, as its own package finds out."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def load_engine(model_dir: str | Path | None, settings: Settings) -> Engine:
    """`Engine.load`, or on a ZeroGPU Space an engine whose requests borrow a GPU.

    Raises:
        ModelDirectoryError, BackendUnavailableError
    """
    if not on_zerogpu():
        return Engine.load(model_dir, settings)
    import spaces  # noqa: F401 - from here on torch has a GPU in name

    if settings.compile:
        logger.warning("ZeroGPU does not support torch.compile; going on without it")
    return ZeroGpuEngine.load(
        model_dir, settings.model_copy(update={"device": "cuda", "compile": False, "warm_up": False})
    )


class ZeroGpuEngine(Engine):
    """An engine that hands each request to a process with a GPU; everything else happens here, on the CPU."""

    def __init__(self, model: CosyVoiceModel, settings: Settings) -> None:
        import spaces

        super().__init__(model, settings)
        self._engine_there: Engine | None = None
        self._borrow = spaces.GPU(duration=gpu_seconds)(self._generate)

    async def _speak(
        self, request: SynthesisRequest, seed: int, timings: Timings, submitted: float
    ) -> AsyncGenerator[AudioChunk, None]:
        if not isinstance(request.text, str):
            raise InvalidRequestError("Give the whole text at once here.", param="text")
        fields = _to_plain(await self._prompt_of(request))
        steps = self._borrow(replace(request, prompt=None, voice=None, seed=seed), fields)
        step = None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
                made = await asyncio.shield(step)
                if isinstance(made, AudioChunk):
                    yield made
                elif isinstance(made, CosyError):
                    raise made
                elif isinstance(made, Timings):
                    timings.first_token, timings.tokens = made.first_token, made.tokens
                else:
                    return
        except gr.Error as error:  # no GPU: the visitor's quota is used up, or the process was stopped
            raise CosyError(_plain_text(error.message)) from error
        finally:
            if step is not None:
                await asyncio.wait({step})
            await asyncio.to_thread(steps.close)

    def _generate(self, request: SynthesisRequest, fields: _Fields) -> Iterator[AudioChunk | Timings | CosyError]:
        """Runs where the GPU is. Errors meant for the caller are handed over; raised, only their name would arrive."""
        if self._engine_there is None:
            self._engine_there = Engine(self.model, self.settings, self.frontend)
        with asyncio.Runner() as runner:
            synthesis = self._engine_there.synthesize(replace(request, prompt=_from_plain(fields)))

            async def step() -> AudioChunk | None:
                return await anext(aiter(synthesis), None)

            try:
                while (chunk := runner.run(step())) is not None:
                    yield chunk
                yield synthesis.timings
            except CosyError as error:
                yield error
            finally:
                runner.run(synthesis.cancel())


def gpu_seconds(request: SynthesisRequest, fields: _Fields) -> int:
    """How long a request may keep the GPU; a shorter claim is served sooner and costs less of the visitor's quota."""
    seconds = _SHORTEST + _SECONDS_PER_CHARACTER * len(request.text)
    if request.source is not None:
        seconds += request.source.seconds
    return round(min(seconds, _LONGEST))


def _to_plain(prompt: Prompt) -> _Fields:
    """A prompt without tensors: theirs would travel through shared memory that the other process may not have."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(prompt).items()}


def _from_plain(fields: _Fields) -> Prompt:
    return Prompt(
        **{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    )


def _plain_text(message: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", message))
