"""Tab: a recording's voice, spoken as an instruction says."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.errors import InvalidRequestError
from cosy_engine.ui.common import Tab, help_text, instruction_box, make_prompt, prompt_audio
from cosy_engine.ui.texts import label, say


def build(engine: Engine) -> Tab:
    with gr.Tab(label("instruct"), id="instruct"):
        help_text("instruct_help")
        recording = prompt_audio()
        instruction = instruction_box("instruction")

    async def fields(web: gr.Request, recording: str | None, instruction: str) -> dict[str, object]:
        if not instruction.strip():
            raise InvalidRequestError(say(web, "need_instruction"), param="instruct")
        return {
            "mode": "instruct",
            "prompt": await make_prompt(engine, web, recording),
            "instruct": instruction.strip(),
        }

    return Tab("instruct", [recording, instruction], fields)
