"""Tab: the visitor's saved voices - speak with one, save another, rename, delete, export, import."""

from __future__ import annotations

import asyncio
import base64
import json

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui import enrolment, examples
from cosy_engine.ui.common import (
    PRIVATE,
    Tab,
    Updates,
    attempt,
    help_text,
    instruction_box,
    message,
    note,
    note_of,
)
from cosy_engine.ui.recording import mode_of
from cosy_engine.ui.texts import complaint, label, say
from cosy_engine.ui.transcribe import Transcriber
from cosy_engine.ui.visitors import StoreOf, welcome
from cosy_engine.ui.voice_list import VoiceList

_DOWNLOAD = """(file) => {
  if (!file) return;
  const { name, content } = JSON.parse(file);
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build(
    engine: Engine,
    page: gr.Blocks,
    text: gr.Textbox,
    transcriber: Transcriber | None,
    visitor: gr.BrowserState,
    store_of: StoreOf,
    shared: bool,
) -> Tab:
    """The list of voices is read anew whenever `page` loads."""
    with gr.Tab(label("saved"), id="saved"):
        help_text("saved_help_shared" if shared else "saved_help")
        empty = gr.Markdown(label("no_voices"), elem_id="no-voices")
        chosen_id = gr.Textbox(visible="hidden")
        with gr.Column(visible=False) as chooser:
            with gr.Row(equal_height=True):
                voice = gr.Dropdown(label=label("voice"), choices=[], interactive=True, scale=4, elem_id="voice")
                preview = gr.Button(label("preview"), scale=1, min_width=90, elem_id="preview")
            about = note(elem_id="about")
            instruction = instruction_box("instruction_optional", engine.frontend.instructions)
            instruction_note = note_of(instruction)
            shown = examples.build(examples.EXAMPLES["saved"], need_voice=True)
            shown.fill(text, chosen_id, instruction=instruction)
        voice_note = note()
        voices = VoiceList(store_of, visitor, voice, chosen_id, empty, chooser)
        enrol = enrolment.build(engine, voices, transcriber)
        _management(voices)

    async def on_load(key: str | None, chosen: str | None) -> Updates:
        key = welcome(key)
        listed = await voices.updates(key, chosen)
        nothing = not await asyncio.to_thread(store_of(key).list)
        return {visitor: key, enrol.panel: gr.Accordion(open=nothing)} | listed

    async def fields(web: gr.Request, key: str, chosen: str | None, instruct: str) -> dict[str, object]:
        prompt = engine.frontend.prompt_of(await asyncio.to_thread(store_of(key).get, _chosen(chosen)))
        if instruct.strip():
            return {"mode": "instruct", "prompt": prompt, "instruct": instruct.strip()}
        return {"mode": mode_of(prompt), "prompt": prompt}

    page.load(on_load, [visitor, chosen_id], [visitor, enrol.panel, *voices.components], **PRIVATE)
    voice.change(None, voice, [chosen_id, voice_note], js="(id) => [id ?? '', '']", **PRIVATE)
    chosen_id.change(voices.about, [visitor, chosen_id], about, **PRIVATE)
    notes = {"voice": voice_note, "instruct": instruction_note}
    inputs = [visitor, chosen_id, instruction]
    return Tab("saved", inputs, fields, notes, (enrol.audio, enrol.transcript), preview)


def _management(voices: VoiceList) -> None:
    """Rename, delete, export and import."""
    visitor, voice = voices.visitor, voices.chosen
    with gr.Accordion(label("manage"), open=False):
        new_name = gr.Textbox(label=label("new_name"), max_lines=1, max_length=100, elem_id="new-name")
        name_note = note_of(new_name)
        with gr.Row():
            rename = gr.Button(label("rename_button"), min_width=90, elem_id="rename")
            delete = gr.Button(label("delete_button"), variant="stop", min_width=90, elem_id="delete")
        with gr.Row(visible=False) as really:
            confirm = gr.Button(label("delete_confirm"), variant="stop", elem_id="delete-confirmed")
            keep = gr.Button(label("delete_keep"))
        with gr.Row():
            export = gr.Button(label("export_button"), min_width=90, elem_id="export")
            imported = gr.UploadButton(
                label("import_button"), type="binary", file_types=[".safetensors"], min_width=90, elem_id="import"
            )
        status = note(elem_id="manage-note")
        file = gr.Textbox(visible="hidden")
    notes = {"name": name_note}

    async def on_rename(web: gr.Request, key: str, chosen: str | None, called: str) -> Updates:
        async def work() -> Updates:
            chosen_id = _chosen(chosen)
            if not called.strip():
                raise complaint("need_name", "name")
            await asyncio.to_thread(voices.store_of(key).rename, chosen_id, called)
            done = {status: message(say(web, "renamed", name=called.strip())), new_name: ""}
            return done | await voices.updates(key, chosen)

        return await attempt(web, notes, status, work())

    async def on_delete(web: gr.Request, key: str, chosen: str | None) -> Updates:
        async def work() -> Updates:
            store, chosen_id = voices.store_of(key), _chosen(chosen)
            names = {entry.id: entry.name for entry in await asyncio.to_thread(store.list)}
            await asyncio.to_thread(store.delete, chosen_id)
            done = {status: message(say(web, "deleted", name=names.get(chosen_id, chosen_id)))}
            return done | await voices.updates(key, None)

        return {really: gr.Row(visible=False)} | await attempt(web, notes, status, work())

    async def on_export(web: gr.Request, key: str, chosen: str | None) -> Updates:
        async def work() -> Updates:
            store, chosen_id = voices.store_of(key), _chosen(chosen)
            content = await asyncio.to_thread(store.export_voice, chosen_id)
            name = (await asyncio.to_thread(store.get, chosen_id)).name
            packed = json.dumps({"name": f"{chosen_id}.safetensors", "content": base64.b64encode(content).decode()})
            return {status: message(say(web, "exported", name=name)), file: packed}

        return {file: ""} | await attempt(web, notes, status, work())

    async def on_import(web: gr.Request, key: str, chosen: str | None, content: bytes) -> Updates:
        async def work() -> Updates:
            made = await asyncio.to_thread(voices.store_of(key).import_voice, content)
            return {status: message(say(web, "imported", name=made.name))} | await voices.updates(key, made.id)

        return await attempt(web, {}, status, work())

    listed = [status, *notes.values(), *voices.components]
    rename.click(on_rename, [visitor, voice, new_name], [new_name, *listed], **PRIVATE)
    delete.click(lambda: gr.Row(visible=True), None, really, **PRIVATE)
    keep.click(lambda: gr.Row(visible=False), None, really, **PRIVATE)
    confirm.click(on_delete, [visitor, voice], [really, *listed], **PRIVATE)
    exporting = export.click(on_export, [visitor, voice], [file, status, *notes.values()], **PRIVATE)
    exporting.then(None, file, None, js=_DOWNLOAD, **PRIVATE)
    imported.upload(on_import, [visitor, voice, imported], listed, **PRIVATE)


def _chosen(voice: str | None) -> str:
    if not voice:
        raise complaint("need_voice", "voice")
    return voice
