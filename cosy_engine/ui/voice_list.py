"""A visitor's saved voices on the page: the list to choose from, and how it is shown anew after a change."""

from __future__ import annotations

import asyncio
import html
from dataclasses import dataclass

import gradio as gr

from cosy_engine.errors import CosyError
from cosy_engine.ui.common import Updates, explain
from cosy_engine.ui.texts import say
from cosy_engine.ui.visitors import StoreOf

LONGEST_SHOWN = 80  # characters of a voice's text


@dataclass(frozen=True)
class VoiceList:
    """Attributes:
    visitor: the visitor's key.
    voice: the list.
    chosen: the id of the chosen voice, hidden: a dropdown's own value is refused by Gradio when the list has changed
        behind the page's back, while the voice store says what is wrong.
    empty: what stands there instead when there are no voices.
    chooser: all that is about the chosen voice, hidden when there are none.
    """

    store_of: StoreOf
    visitor: gr.BrowserState
    voice: gr.Dropdown
    chosen: gr.Textbox
    empty: gr.Markdown
    chooser: gr.Column

    @property
    def components(self) -> list[gr.components.Component]:
        return [self.voice, self.chosen, self.empty, self.chooser]

    async def updates(self, key: str, chosen: str | None) -> Updates:
        """The list as it is now, with `chosen` chosen if it is there, else the first."""
        voices = await asyncio.to_thread(self.store_of(key).list)
        ids = [entry.id for entry in voices]
        if chosen not in ids:
            chosen = ids[0] if ids else None
        choices = [(f"{entry.name} ⚠" if entry.problem else entry.name, entry.id) for entry in voices]
        return {
            self.voice: gr.Dropdown(choices=choices, value=chosen),
            self.chosen: chosen or "",
            self.empty: gr.Markdown(visible=not voices),
            self.chooser: gr.Column(visible=bool(voices)),
        }

    async def about(self, web: gr.Request, key: str, chosen: str | None) -> str:
        """What is known of a voice, or why it cannot be used."""
        if not chosen:
            return ""
        try:
            voice = await asyncio.to_thread(self.store_of(key).get, chosen)
        except CosyError as error:
            return explain(error, web)
        builtin = voice.kind == "builtin"
        lines = [say(web, "voice_builtin" if builtin else "voice_about", created=voice.created[:10])]
        if voice.prompt.text:
            text = voice.prompt.text
            shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
            lines.append(say(web, "voice_says", text=shown))
        return f'<p class="about">{html.escape(" ".join(lines))}</p>'
