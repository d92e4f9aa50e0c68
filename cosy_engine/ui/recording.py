"""A recording of a voice on the page: upload or microphone, trimming, what is to be said about it, its transcript."""

from __future__ import annotations

import asyncio
import html
from dataclasses import dataclass

import gradio as gr

from cosy_engine.audio.decode import load_audio
from cosy_engine.audio.quality import Finding, assess
from cosy_engine.engine import Engine
from cosy_engine.errors import InvalidAudioError, InvalidRequestError
from cosy_engine.frontend import Prompt
from cosy_engine.ui.common import PRIVATE, explain, note, note_of
from cosy_engine.ui.texts import label, say
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


def recording_field() -> RecordingField:
    """The audio's value is the path of the file as it came; once it is there, a verdict stands below it."""
    audio = gr.Audio(
        label=label("prompt"), sources=["upload", "microphone"], type="filepath", buttons=[], elem_classes="prompt"
    )
    below = note()
    verdict = gr.HTML(elem_classes="note", padding=False)

    async def judge(web: gr.Request, path: str | None) -> tuple[str, str]:
        if path is None:
            return "", ""
        try:
            return "", _verdict(web, await asyncio.to_thread(lambda: assess(load_audio(path))))
        except Exception as error:
            return explain(error, web), ""

    audio.change(judge, audio, [below, verdict], **PRIVATE)
    return RecordingField(audio, below)


def transcript_field(recording: RecordingField, transcriber: Transcriber | None, key: str) -> TranscriptField:
    """Filled in from the recording when something can listen and nothing is typed yet."""
    box = gr.Textbox(
        label=label(key), placeholder=label("transcript_hint"), lines=2, max_length=1000, elem_classes="transcript"
    )
    below = note_of(box)
    if transcriber is not None:

        async def listen(web: gr.Request, path: str | None, typed: str) -> tuple[object, str]:
            if path is None or typed.strip():
                return gr.skip(), ""
            try:
                return await asyncio.to_thread(transcriber, path), ""
            except Exception as error:
                return gr.skip(), explain(error, web)

        recording.audio.change(listen, [recording.audio, box], [box, below], **PRIVATE)
    return TranscriptField(box, below)


async def make_prompt(engine: Engine, web: gr.Request, path: str | None, transcript: str = "") -> Prompt:
    """The recording as the models take it.

    Raises:
        InvalidAudioError: there is no recording, or it cannot be used.
        InvalidRequestError: the transcript is too long.
    """
    if path is None:
        raise InvalidAudioError(say(web, "need_prompt"), param="prompt_audio")
    return await engine.make_prompt(path, transcript.strip())


def need_transcript(web: gr.Request, transcript: str) -> None:
    """Raises InvalidRequestError if there is none."""
    if not transcript.strip():
        raise InvalidRequestError(say(web, "need_transcript"), param="prompt_text")


def _verdict(web: gr.Request, findings: list[Finding]) -> str:
    worst = max((finding.grade for finding in findings), key=("good", "fair", "poor").index)
    lines = [
        f'<li class="{f.grade}">{html.escape(say(web, f"{f.aspect}_{f.grade}", value=f.value))}</li>' for f in findings
    ]
    headline = html.escape(say(web, f"verdict_{worst}"))
    return f'<div class="verdict {worst}" role="status"><p>{headline}</p><ul>{"".join(lines)}</ul></div>'
