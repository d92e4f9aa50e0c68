"""Tab: clone a voice from a recording and its transcript."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui import examples
from cosy_engine.ui.common import Tab, help_text
from cosy_engine.ui.recording import make_prompt, mode_of, recording_field, transcript_field
from cosy_engine.ui.texts import label
from cosy_engine.ui.transcribe import Transcriber


def build(engine: Engine, text: gr.Textbox, transcriber: Transcriber | None) -> Tab:
    with gr.Tab(label("zero_shot"), id="zero_shot"):
        help_text("zero_shot_help" if engine.model.continues_recordings else "zero_shot_help_timbre")
        shown = examples.build(examples.EXAMPLES["zero_shot"])
        recording = recording_field(engine)
        transcript = transcript_field(engine, recording, transcriber)
        shown.fill(text, recording.audio, transcript=transcript.box)

    async def fields(web: gr.Request, path: str | None, transcript: str) -> dict[str, object]:
        prompt = await make_prompt(engine, path, transcript)
        return {"mode": mode_of(prompt), "prompt": prompt}

    notes = {"prompt_audio": recording.note, "prompt_text": transcript.note}
    inputs = [recording.audio, transcript.box]
    return Tab("zero_shot", inputs, fields, notes, (recording.audio, transcript.box))
