"""Tab: clone a voice from a recording and its transcript."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui.common import Tab, help_text, make_prompt, prompt_audio, transcript_box
from cosy_engine.ui.texts import label


def build(engine: Engine) -> Tab:
    with gr.Tab(label("zero_shot"), id="zero_shot"):
        help_text("zero_shot_help")
        recording = prompt_audio()
        transcript = transcript_box()

    async def fields(web: gr.Request, recording: str | None, transcript: str) -> dict[str, object]:
        return {"mode": "zero_shot", "prompt": await make_prompt(engine, web, recording, transcript)}

    return Tab("zero_shot", [recording, transcript], fields)
