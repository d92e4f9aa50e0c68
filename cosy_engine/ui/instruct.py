"""Tab: a recording's voice, spoken as an instruction says."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.errors import InvalidRequestError
from cosy_engine.ui import examples
from cosy_engine.ui.common import Tab, help_text, instruction_box, note_of
from cosy_engine.ui.recording import make_prompt, recording_field
from cosy_engine.ui.texts import label, say


def build(engine: Engine, text: gr.Textbox) -> Tab:
    with gr.Tab(label("instruct"), id="instruct"):
        help_text("instruct_help")
        recording = recording_field()
        instruction = instruction_box("instruction")
        instruction_note = note_of(instruction)
        examples.build("instruct", text, recording.audio, instruction=instruction)

    async def fields(web: gr.Request, path: str | None, instruction: str) -> dict[str, object]:
        prompt = await make_prompt(engine, web, path)
        if not instruction.strip():
            raise InvalidRequestError(say(web, "need_instruction"), param="instruct")
        return {"mode": "instruct", "prompt": prompt, "instruct": instruction.strip()}

    notes = {"prompt_audio": recording.note, "instruct": instruction_note}
    return Tab("instruct", [recording.audio, instruction], fields, notes)
