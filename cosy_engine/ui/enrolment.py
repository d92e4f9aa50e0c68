"""Panel: save the voice of a recording under a name."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import gradio as gr

from cosy_engine.engine import Engine
from cosy_engine.ui.common import PRIVATE, Updates, attempt, message, note, note_of
from cosy_engine.ui.recording import make_prompt, recording_field, transcript_field
from cosy_engine.ui.texts import complaint, label, say
from cosy_engine.ui.transcribe import Transcriber
from cosy_engine.ui.voice_list import VoiceList


@dataclass(frozen=True)
class Enrolment:
    """The panel, and its fields for a recording and what is said in it."""

    panel: gr.Accordion
    audio: gr.Audio
    transcript: gr.Textbox


def build(engine: Engine, voices: VoiceList, transcriber: Transcriber | None) -> Enrolment:
    with gr.Accordion(label("enrol"), open=False) as panel:
        recording = recording_field(engine)
        transcript = transcript_field(engine, recording, transcriber)
        name = gr.Textbox(
            label=label("name"), placeholder=label("name_hint"), max_lines=1, max_length=100, elem_id="voice-name"
        )
        name_note = note_of(name)
        consent = gr.Checkbox(label=label("consent"), elem_id="consent")
        consent_note = note()
        consent.input(None, None, consent_note, js="() => ''", **PRIVATE)
        save = gr.Button(label("enrol_button"), variant="primary", elem_id="enrol")
        status = note(elem_id="enrol-note")
    notes = {
        "prompt_audio": recording.note,
        "prompt_text": transcript.note,
        "name": name_note,
        "consent": consent_note,
    }

    async def on_save(
        web: gr.Request, key: str, path: str | None, spoken: str, called: str, consented: bool
    ) -> Updates:
        async def work() -> Updates:
            if path is not None and not called.strip():
                raise complaint("need_name", "name")
            if path is not None and not consented:
                raise complaint("need_consent", "consent")
            prompt = await make_prompt(engine, path, spoken)
            made = await asyncio.to_thread(voices.store_of(key).enroll, called, prompt)
            emptied = {recording.audio: None, transcript.box: "", name: "", consent: False}
            done = {status: message(say(web, "enrolled", name=made.name))}
            return emptied | done | await voices.updates(key, made.id)

        return await attempt(web, notes, status, work())

    inputs = [voices.visitor, recording.audio, transcript.box, name, consent]
    save.click(on_save, inputs, [*inputs[1:], *notes.values(), status, *voices.components], **PRIVATE)
    return Enrolment(panel, recording.audio, transcript.box)
