"""Tab: a recording's voice, spoken as an instruction says."""

from __future__ import annotations

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui import examples
from cosy_engine.ui.common import Tab, help_text, instruction_box, note_of
from cosy_engine.ui.recording import make_prompt, recording_field
from cosy_engine.ui.texts import complaint, label


def build(engine: Engine, text: gr.Textbox) -> Tab:
    with gr.Tab(label("instruct"), id="instruct"):
        learned = engine.frontend.instructions
        help_text("instruct_help" if learned is None else "instruct_help_learned")
        known = examples.EXAMPLES["instruct"] if learned is None else examples.of_instructions(learned)
        shown = examples.build(known)
        instruction = instruction_box("instruction", learned)
        instruction_note = note_of(instruction)
        recording = recording_field(engine)
        words = gr.Textbox(visible="hidden")
        shown.fill(text, recording.audio, transcript=words, instruction=instruction)

    async def fields(web: gr.Request, path: str | None, instruction: str) -> dict[str, object]:
        prompt = await make_prompt(engine, path)
        if not instruction.strip():
            raise complaint("need_instruction", "instruct")
        return {"mode": "instruct", "prompt": prompt, "instruct": instruction.strip()}

    notes = {"prompt_audio": recording.note, "instruct": instruction_note}
    return Tab("instruct", [recording.audio, instruction], fields, notes, (recording.audio, words))
