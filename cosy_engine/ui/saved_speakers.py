"""Tab: voices that were saved - speak with one, save another, rename, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.errors import InvalidRequestError
from cosy_engine.ui.common import (
    PRIVATE,
    Tab,
    explain,
    help_text,
    instruction_box,
    message,
    prompt_audio,
    transcript_box,
)
from cosy_engine.ui.texts import label, say

_VoiceUpdate = tuple[object, object, str]  # voice list, hint when it is empty, message


def build(engine: Engine, page: gr.Blocks) -> Tab:
    """The list of voices is read anew whenever `page` loads."""
    with gr.Tab(label("saved"), id="saved"):
        empty = help_text("no_voices")
        voice = gr.Dropdown(label=label("voice"), choices=[], interactive=True, elem_id="voice")
        instruction = instruction_box("instruction_optional")
        note = gr.HTML(elem_id="voice-note", elem_classes="note", padding=False)
        with gr.Accordion(label("enrol"), open=False):
            recording = prompt_audio()
            transcript = transcript_box()
            name = gr.Textbox(label=label("name"), max_lines=1, max_length=100, elem_id="voice-name")
            enrol = gr.Button(label("enrol_button"), variant="primary", elem_id="enrol")
        with gr.Accordion(label("manage"), open=False):
            new_name = gr.Textbox(label=label("new_name"), max_lines=1, max_length=100, elem_id="new-name")
            with gr.Row():
                rename = gr.Button(label("rename_button"), elem_id="rename")
                delete = gr.Button(label("delete_button"), variant="stop", elem_id="delete")
            with gr.Row(visible=False) as really:
                delete_confirmed = gr.Button(label("delete_confirm"), variant="stop", elem_id="delete-confirmed")
                keep = gr.Button(label("delete_keep"))

    async def listing(chosen: str | None) -> tuple[object, object]:
        voices = await asyncio.to_thread(engine.voices.list)
        ids = [entry.id for entry in voices]
        if chosen not in ids:
            chosen = ids[0] if ids else None
        choices = [(f"{entry.name} ⚠" if entry.problem else entry.name, entry.id) for entry in voices]
        return gr.Dropdown(choices=choices, value=chosen), gr.Markdown(visible=not voices)

    async def change(web: gr.Request, chosen: str | None, work: Awaitable[tuple[str | None, str]]) -> _VoiceUpdate:
        """Do `work`, which gives the voice to choose next and the message, and list the voices again."""
        try:
            chosen, done = await work
            said = message(done)
        except Exception as error:
            said = explain(error, web)
        return (*await listing(chosen), said)

    async def on_enrol(
        web: gr.Request, chosen: str | None, recording: str | None, transcript: str, name: str
    ) -> _VoiceUpdate:
        async def work() -> tuple[str, str]:
            if recording is None:
                raise InvalidRequestError(say(web, "need_prompt"), param="prompt")
            if not name.strip():
                raise InvalidRequestError(say(web, "need_name"), param="name")
            made = await engine.enroll(name.strip(), recording, transcript.strip())
            return made.id, say(web, "enrolled", name=made.name)

        return await change(web, chosen, work())

    async def on_rename(web: gr.Request, chosen: str | None, new_name: str) -> _VoiceUpdate:
        async def work() -> tuple[str, str]:
            if not new_name.strip():
                raise InvalidRequestError(say(web, "need_name"), param="name")
            await asyncio.to_thread(engine.voices.rename, _chosen(web, chosen), new_name.strip())
            return chosen, say(web, "renamed", name=new_name.strip())

        return await change(web, chosen, work())

    async def on_delete(web: gr.Request, chosen: str | None) -> _VoiceUpdate:
        async def work() -> tuple[None, str]:
            names = {entry.id: entry.name for entry in await asyncio.to_thread(engine.voices.list)}
            await asyncio.to_thread(engine.voices.delete, _chosen(web, chosen))
            return None, say(web, "deleted", name=names[chosen])

        return await change(web, chosen, work())

    async def fields(web: gr.Request, voice: str | None, instruction: str) -> dict[str, object]:
        prompt = (await asyncio.to_thread(engine.voices.get, _chosen(web, voice))).prompt
        if instruction.strip():
            return {"mode": "instruct", "prompt": prompt, "instruct": instruction.strip()}
        return {"mode": "zero_shot" if len(prompt.text_token) else "cross_lingual", "prompt": prompt}

    changed = [voice, empty, note]
    page.load(listing, voice, [voice, empty], **PRIVATE)
    enrol.click(on_enrol, [voice, recording, transcript, name], changed, **PRIVATE)
    rename.click(on_rename, [voice, new_name], changed, **PRIVATE)
    delete.click(lambda: gr.Row(visible=True), None, really, **PRIVATE)
    keep.click(lambda: gr.Row(visible=False), None, really, **PRIVATE)
    delete_confirmed.click(on_delete, voice, changed, **PRIVATE).then(
        lambda: gr.Row(visible=False), None, really, **PRIVATE
    )
    return Tab("saved", [voice, instruction], fields)


def _chosen(web: gr.Request, voice: str | None) -> str:
    if not voice:
        raise InvalidRequestError(say(web, "need_voice"), param="voice")
    return voice
