"""Tab: clone a voice from a recording and its transcript."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui import examples
from cosy_engine.ui.common import Tab, help_text
from cosy_engine.ui.recording import make_prompt, need_transcript, recording_field, transcript_field
from cosy_engine.ui.texts import label
from cosy_engine.ui.transcribe import Transcriber


def build(engine: Engine, text: gr.Textbox, transcriber: Transcriber | None) -> Tab:
    with gr.Tab(label("zero_shot"), id="zero_shot"):
        help_text("zero_shot_help")
        recording = recording_field()
        transcript = transcript_field(recording, transcriber, "transcript")
        examples.build("zero_shot", text, recording.audio, transcript=transcript.box)

    async def fields(web: gr.Request, path: str | None, transcript: str) -> dict[str, object]:
        if path is not None:
            need_transcript(web, transcript)
        return {"mode": "zero_shot", "prompt": await make_prompt(engine, web, path, transcript)}

    notes = {"prompt_audio": recording.note, "prompt_text": transcript.note}
    return Tab("zero_shot", [recording.audio, transcript.box], fields, notes)
