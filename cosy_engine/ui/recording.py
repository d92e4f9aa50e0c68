"""A recording of a voice on the page: upload or microphone, trimming, what is to be said about it, its transcript."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from cosy_engine.audio.decode import load_audio
from cosy_engine.audio.quality import Finding, assess
from cosy_engine.engine import Engine
from cosy_engine.errors import InvalidAudioError
from cosy_engine.frontend import Mode, Prompt
from cosy_engine.ui.common import PRIVATE, explain, note, note_of
from cosy_engine.ui.texts import complaint, label, say
from cosy_engine.ui.transcribe import Transcriber


@dataclass(frozen=True)
class RecordingField:
    """The component with the recording, and where sentences about it go."""

    audio: gr.Audio
    note: gr.HTML


@dataclass(frozen=True)
class TranscriptField:
    """The component with what is said in the recording, and where sentences about it go."""

    box: gr.Textbox
    note: gr.HTML


def recording_field(engine: Engine) -> RecordingField:
    """The audio's value is the path of the file as it came. Once it is there, a verdict stands below it, and the voice
    is made ready before anybody asks for speech."""
    audio = gr.Audio(
        label=label("prompt"), sources=["upload", "microphone"], type="filepath", buttons=[], elem_classes="prompt"
    )
    below = note()
    verdict = gr.HTML(elem_classes="note", padding=False)

    async def judge(web: gr.Request, path: str | None) -> AsyncIterator[tuple[str, str]]:
        if path is None:
            yield "", ""
            return
        findings: list[Finding] = []
        try:
            findings = await asyncio.to_thread(lambda: assess(load_audio(path)))
            yield "", _verdict(web, findings, "voice_preparing")
            await engine.make_prompt(path)
            yield gr.skip(), _verdict(web, findings, "voice_ready")
        except Exception as error:
            told = isinstance(error, InvalidAudioError) and any(finding.grade == "poor" for finding in findings)
            yield "" if told else explain(error, web), _verdict(web, findings) if told else ""

    audio.change(judge, audio, [below, verdict], concurrency_limit=None, **PRIVATE)
    return RecordingField(audio, below)


def transcript_field(engine: Engine, recording: RecordingField, transcriber: Transcriber | None) -> TranscriptField:
    """Filled in from the recording when something can listen and nothing is typed yet; not shown if the model makes
    nothing of it."""
    wanted = engine.model.continues_recordings
    box = gr.Textbox(
        "",
        label=label("transcript"),
        placeholder=label("transcript_hint"),
        lines=2,
        max_length=1000,
        visible=wanted or "hidden",
    )
    below = note_of(box)
    if wanted and transcriber is not None:

        async def listen(web: gr.Request, path: str | None, typed: str) -> tuple[object, str]:
            if path is None or typed.strip():
                return gr.skip(), ""
            try:
                return await asyncio.to_thread(transcriber, path), ""
            except Exception as error:
                return gr.skip(), explain(error, web)

        recording.audio.change(listen, [recording.audio, box], [box, below], **PRIVATE)
    return TranscriptField(box, below)


async def make_prompt(engine: Engine, path: str | None, transcript: str = "") -> Prompt:
    """The recording as the models take it.

    Raises:
        InvalidRequestError: there is no recording, it cannot be used, or the transcript is too long.
    """
    if path is None:
        raise complaint("need_prompt", "prompt_audio")
    if not Path(path).is_file():  # deleted since
        raise complaint("recording_gone", "prompt_audio")
    return await engine.make_prompt(path, transcript.strip())


def mode_of(prompt: Prompt) -> Mode:
    """How to clone a voice: from its recording and the words in it, or from the recording alone."""
    return "zero_shot" if len(prompt.text_token) else "cross_lingual"


def _verdict(web: gr.Request, findings: list[Finding], state: str | None = None) -> str:
    """The verdict on a recording; `state` is the text that says how far its voice is."""
    worst = max((finding.grade for finding in findings), key=("good", "fair", "poor").index)
    lines = [
        f'<li class="{f.grade}">{html.escape(say(web, f"{f.aspect}_{f.grade}", value=f.value))}</li>' for f in findings
    ]
    headline = html.escape(say(web, f"verdict_{worst}"))
    ready = f'<span class="{state}">{html.escape(say(web, state))}</span>' if state else ""
    return f'<div class="verdict {worst}" role="status"><p>{headline}{ready}</p><ul>{"".join(lines)}</ul></div>'
