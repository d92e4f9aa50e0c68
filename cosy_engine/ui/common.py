"""What the tabs share: fields, and sentences beside them."""

from __future__ import annotations

import html
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import gradio as gr

from cosy_engine.errors import CosyError
from cosy_engine.text.instructions import Instructions
from cosy_engine.ui.texts import label, say, sentence

logger = logging.getLogger(__name__)

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}  # for every event of the page

Updates = dict[gr.components.Component, object]  # new values of components
Notes = dict[str, gr.HTML]  # the place for a sentence about a parameter


@dataclass(frozen=True)
class Tab:
    """A tab as the page sees it.

    Attributes:
        inputs: components whose values `fields` takes, after the web request.
        fields: these values as fields of a SynthesisRequest.
        notes: where a sentence about each of those fields stands.
        recording: where one can be given, and what is said in it, hidden if the tab does not ask; both go along to the
            tab that is opened next.
        preview: a button that speaks a short sentence, if the tab has one.
    """

    id: str
    inputs: list[gr.components.Component]
    fields: Callable[..., Awaitable[dict[str, object]]]
    notes: Notes
    recording: tuple[gr.Audio, gr.Textbox]
    preview: gr.Button | None = None


def help_text(key: str) -> gr.Markdown:
    return gr.Markdown(label(key), elem_classes="help")


def instruction_box(key: str, instructions: Instructions | None) -> gr.Textbox:
    """Args:
    instructions: those that the model has learned, if it does not take any.
    """
    hint = label("instruction_hint" if instructions is None else "instruction_hint_learned")
    return gr.Textbox(label=label(key), placeholder=hint, lines=2, max_length=500, elem_classes="instruction")


def note(**options: object) -> gr.HTML:
    """An empty place for a sentence; it takes no room until there is one."""
    return gr.HTML(elem_classes="note", padding=False, **options)


def note_of(box: gr.Textbox) -> gr.HTML:
    """A place for a sentence about a text box, emptied when the text changes."""
    below = note()
    box.change(None, None, below, js="() => ''", **PRIVATE)
    return below


def message(text: str, *, error: bool = False) -> str:
    """A line for the page; `text` may hold anything and is shown as it is."""
    role, kind = ("alert", "error") if error else ("status", "info")
    return f'<p role="{role}" class="message {kind}">{html.escape(text)}</p>'


def explain(error: Exception, web: gr.Request) -> str:
    """An exception as one sentence on the page; what the caller cannot mend goes to the log."""
    if isinstance(error, CosyError):
        return message(sentence(web, error), error=True)
    logger.error("unexpected error in a page request", exc_info=error)
    return message(say(web, "failure"), error=True)


def place(error: Exception, web: gr.Request, notes: Notes, status: gr.HTML) -> Updates:
    """The sentence about an exception beside the field at fault, or in the status line if it is nobody's fault."""
    beside = notes.get(getattr(error, "param", None))
    if beside is None:
        return {status: explain(error, web)}
    return {beside: explain(error, web), status: message(say(web, "see_field"))}


async def attempt(web: gr.Request, notes: Notes, status: gr.HTML, work: Awaitable[Updates]) -> Updates:
    """What a form does when its button is pressed: the updates that `work` gives, or a sentence on why not."""
    empty = dict.fromkeys([*notes.values(), status], "")
    try:
        return empty | await work
    except Exception as error:
        return empty | place(error, web, notes, status)
