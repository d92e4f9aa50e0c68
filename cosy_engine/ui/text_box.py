"""The text to speak, with its length and about how long it takes to say, counted in the browser while typing."""

from __future__ import annotations

import json

import gradio as gr

from cosy_engine.frontend import MAX_TEXT, OTHER_PER_SECOND, WIDE_FROM, WIDE_PER_SECOND
from cosy_engine.ui.common import PRIVATE, note_of
from cosy_engine.ui.texts import both, label

_COUNT = """(text) => {
  const texts = %(texts)s[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"];
  const characters = [...text];
  const wide = characters.filter((character) => character >= %(wide_from)s).length;
  const seconds = wide / %(wide)s + (characters.length - wide) / %(other)s;
  const values = { count: characters.length, seconds: Math.ceil(seconds), most: %(most)d };
  const long = characters.length > %(most)d;
  const said = texts[long ? "count_too_long" : "count"].replace(/{(\\w+)}/g, (_, key) => values[key]);
  return characters.length ? `<p class="count${long ? " too-long" : ""}">${said}</p>` : "";
}"""


def text_box() -> tuple[gr.Textbox, gr.HTML]:
    """The box, and the place for sentences about it."""
    box = gr.Textbox(label=label("text"), placeholder=label("text_hint"), lines=3, max_lines=12, elem_id="text")
    count = gr.HTML(elem_id="count", elem_classes="note", padding=False)
    values = {
        "texts": json.dumps(both("count", "count_too_long")),
        "wide_from": json.dumps(WIDE_FROM),
        "wide": WIDE_PER_SECOND,
        "other": OTHER_PER_SECOND,
        "most": MAX_TEXT,
    }
    box.change(None, box, count, js=_COUNT % values, **PRIVATE)
    return box, note_of(box)
