"""Tab: a recording's voice speaks a text in another language."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui import examples
from cosy_engine.ui.common import Tab, help_text
from cosy_engine.ui.recording import make_prompt, recording_field
from cosy_engine.ui.texts import label


def build(engine: Engine, text: gr.Textbox) -> Tab:
    with gr.Tab(label("cross_lingual"), id="cross_lingual"):
        help_text("cross_lingual_help")
        shown = examples.build(examples.EXAMPLES["cross_lingual"])
        recording = recording_field(engine)
        words = gr.Textbox(visible="hidden")
        shown.fill(text, recording.audio, transcript=words)

    async def fields(web: gr.Request, path: str | None) -> dict[str, object]:
        return {"mode": "cross_lingual", "prompt": await make_prompt(engine, path)}

    return Tab("cross_lingual", [recording.audio], fields, {"prompt_audio": recording.note}, (recording.audio, words))
