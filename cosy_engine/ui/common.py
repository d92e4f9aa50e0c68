"""What the tabs share: the prompt inputs, messages, and one run of the engine."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import gradio as gr
import numpy as np

from cosy_engine.audio.encode import pcm16, wav_bytes
from cosy_engine.engine import Engine, SynthesisRequest
from cosy_engine.errors import CosyError, InvalidAudioError
from cosy_engine.frontend import Prompt
from cosy_engine.ui.texts import label, say

logger = logging.getLogger(__name__)
T = TypeVar("T")

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # for every event of the page
HEARTBEAT = 1.0  # seconds between signs of life, at which Gradio also notices that the listener has left


@dataclass(frozen=True)
class Tab:
    """A tab as the page sees it: its inputs, and how their values become fields of a SynthesisRequest."""

    id: str
    inputs: list[gr.components.Component]
    fields: Callable[..., Awaitable[dict[str, object]]]


def help_text(key: str) -> gr.Markdown:
    return gr.Markdown(label(key), elem_classes="help")


def prompt_audio() -> gr.Audio:
    """Upload or microphone; the value is the path of the file as it came."""
    return gr.Audio(
        label=label("prompt"), sources=["upload", "microphone"], type="filepath", buttons=[], elem_classes="prompt"
    )


def transcript_box() -> gr.Textbox:
    return gr.Textbox(label=label("transcript"), placeholder=label("transcript_hint"), lines=2, max_length=1000)


def instruction_box(key: str) -> gr.Textbox:
    return gr.Textbox(label=label(key), placeholder=label("instruction_hint"), lines=2, max_length=500)


async def make_prompt(engine: Engine, web: gr.Request, recording: str | None, transcript: str = "") -> Prompt:
    """The recording as the models take it.

    Raises:
        InvalidAudioError: there is no recording, or it cannot be used.
    """
    if recording is None:
        raise InvalidAudioError(say(web, "need_prompt"), param="prompt")
    return await engine.make_prompt(recording, transcript.strip())


def message(text: str, *, error: bool = False) -> str:
    """A line for the page; `text` may hold anything and is shown as it is."""
    role, kind = ("alert", "error") if error else ("status", "info")
    return f'<p role="{role}" class="message {kind}">{html.escape(text)}</p>'


def explain(error: Exception, web: gr.Request) -> str:
    """An exception as one sentence on the page; what the caller cannot mend goes to the log."""
    if isinstance(error, CosyError):
        return message(error.message, error=True)
    logger.error("unexpected error in a page request", exc_info=error)
    return message(say(web, "failure"), error=True)


async def or_nothing(steps: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """The items of `steps`, and None each time `seconds` pass without one."""
    end = object()
    step = None
    try:
        while True:
            step = asyncio.ensure_future(anext(steps, end))
            while not (await asyncio.wait({step}, timeout=seconds))[0]:
                yield None
            if step.result() is end:
                return
            yield step.result()
    finally:
        if step is not None:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)


async def speak(
    engine: Engine, request: SynthesisRequest, web: gr.Request
) -> AsyncIterator[tuple[object, object, str]]:
    """One run: yields values for (live player, whole recording, message).

    Raises:
        CosyError: as the engine does. However the run ends, the engine stops working on it.
    """
    ahead = 0

    def on_position(position: int) -> None:
        nonlocal ahead
        ahead = position

    synthesis = engine.synthesize(request, on_position=on_position)
    heard: list[np.ndarray] = []
    rate = 0
    try:
        async with aclosing(or_nothing(aiter(synthesis), HEARTBEAT)) as chunks:
            async for chunk in chunks:
                status = message(say(web, "waiting", count=ahead) if ahead else say(web, "working"))
                live = gr.skip()
                if chunk is not None and len(chunk.samples):
                    rate = chunk.sample_rate
                    heard.append(chunk.samples)
                    live = wav_bytes(chunk.samples, rate)
                yield live, gr.skip(), status
    finally:
        await synthesis.cancel()

    if not heard:
        raise CosyError(say(web, "no_sound"))
    timings = synthesis.timings
    summary = say(
        web,
        "summary",
        first_audio=timings.first_audio,
        rtf=timings.rtf,
        seconds=timings.audio_seconds,
        seed=synthesis.seed,
    )
    whole = np.frombuffer(pcm16(np.concatenate(heard)), np.int16)
    yield gr.skip(), (rate, whole), message(summary)
