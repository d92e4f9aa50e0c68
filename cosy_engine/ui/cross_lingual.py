"""Tab: a recording's voice speaks a text in another language."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui.common import Tab, help_text, make_prompt, prompt_audio
from cosy_engine.ui.texts import label


def build(engine: Engine) -> Tab:
    with gr.Tab(label("cross_lingual"), id="cross_lingual"):
        help_text("cross_lingual_help")
        recording = prompt_audio()

    async def fields(web: gr.Request, recording: str | None) -> dict[str, object]:
        return {"mode": "cross_lingual", "prompt": await make_prompt(engine, web, recording)}

    return Tab("cross_lingual", [recording], fields)
